"""A tokenizer without a vocabulary file: one token per byte."""

from collections.abc import Collection
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jaxserve.tokenizers.base import Tokenizer
from jaxserve.tokenizers.huggingface import byte_level_alphabet
from jaxserve.tokenizers.settings import TokenizerSettings
from jaxserve.tokenizers.special_splitter import SpecialTokenSplitter

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


class ByteTokenizer(Tokenizer):
    """256 bytes, then `<bos>` (256) and `<eos>` (257); BOS begins every encoded text."""

    BOS, EOS = 256, 257

    def __init__(self) -> None:
        self._names = {"<bos>": self.BOS, "<eos>": self.EOS}
        self._splitter = SpecialTokenSplitter(self._names)
        settings = TokenizerSettings(
            bos_token_id=self.BOS,
            eos_token_ids=(self.EOS,),
            prefix_ids=(self.BOS,),
            chat_template=_CHAT_TEMPLATE,
        )
        super().__init__(settings, vocab_size=258, special_ids=(self.BOS, self.EOS))

    def token_to_id(self, token: str) -> int | None:
        """The id of `<bos>`, `<eos>` or an ASCII character."""
        if len(token) == 1 and token.isascii():
            return ord(token)
        return self._names.get(token)

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._splitter.split(text):
            ids += [part] if isinstance(part, int) else part.encode()
        return ids

    def _encode_marked(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._splitter.split(text):
            plain = [part] if isinstance(part, int) else self._control_marks.restored(part).encode()
            ids += plain
        return ids

    def _text_tokens(self) -> Collection[str]:
        return ()

    def _piece_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return b"<bos>" if token_id == self.BOS else b"<eos>"

    def _save_vocabulary(self, directory: Path) -> None:
        # As a byte-level BPE without merges any loader of tokenizer.json gives the same ids.
        backend = tokenizers.Tokenizer(models.BPE(vocab=byte_level_alphabet(), merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(name, normalized=False) for name in self._names])
        backend.save(str(directory / "tokenizer.json"))
