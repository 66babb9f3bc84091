"""Prompts with a gap: for models that were trained to fill in what is missing between two texts."""

import dataclasses
from collections.abc import Sequence

from jaxserve.tokenizers.base import Tokenizer

# Names of the tokens before the prefix, before the suffix, and before the answer.
_FORMS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001 - DeepSeek-Coder's own
)
# What such models write after the middle, where it is not their usual end.
_ENDS = (
    "<|endoftext|>", "<|fim_pad|>", "<|file_sep|>", "<|repo_name|>", "<|file_separator|>",
    "<fim_pad>", "<file_sep>", "<fim-pad>",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FillInMiddle:
    """The tokens of a model that fills in a middle.

    Attributes:
        prefix, suffix, middle: ids of the tokens before the prefix, the suffix and the answer.
        ends: ids that end an answer, beside the model's usual ones.
    """

    prefix: int
    suffix: int
    middle: int
    ends: tuple[int, ...]

    def prompt(
        self, before: Sequence[int], after: Sequence[int], *, num_first: int = 0
    ) -> list[int]:
        """The prompt that asks for what comes between two texts.

        Args:
            before, after: their token ids.
            num_first: how many of the first stay in front of everything, such as a BOS.
        """
        first, rest = before[:num_first], before[num_first:]
        return [*first, self.prefix, *rest, self.suffix, *after, self.middle]


def fill_in_middle(tokenizer: Tokenizer) -> FillInMiddle | None:
    """How a tokenizer's model fills in a middle; None if it has no tokens for that."""
    for names in _FORMS:
        ids = [tokenizer.token_to_id(name) for name in names]
        if None in ids:
            continue
        prefix, suffix, middle = (token for token in ids if token is not None)
        others = (tokenizer.token_to_id(name) for name in _ENDS)
        ends = [prefix, suffix, middle, *(token for token in others if token is not None)]
        return FillInMiddle(prefix, suffix, middle, tuple(ends))
    return None
