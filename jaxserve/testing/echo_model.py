"""A model that says what it is told to, for tests of what reads an answer."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxserve.testing.fake_executor import FakeModel
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class EchoModel(FakeModel):
    """Answers a chat with the text of the user's last message, byte by byte, and ends.

    For the `ByteTokenizer` and its chat template; masks and biases come before the text.
    """

    vocab_size: int = ByteTokenizer.EOS + 1

    def next_token(self, history: Sequence[int] | np.ndarray, seed: int) -> int:
        """The next byte of that text, or EOS after it."""
        text = bytes(token for token in np.asarray(history).tolist() if token < 256)
        prompt, _, answer = text.rpartition(b"\nassistant:")
        said = prompt.rpartition(b"user: ")[2]
        return said[len(answer)] if len(answer) < len(said) else ByteTokenizer.EOS
