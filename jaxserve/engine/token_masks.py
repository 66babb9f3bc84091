"""Sets of tokens as masks: uint32 [words], where bit t % 32 of word t // 32 stands for token t."""

from collections.abc import Iterable

import numpy as np


def num_words(vocab_size: int) -> int:
    """Words of a mask over so many tokens."""
    return -(-vocab_size // 32)


def mask_of(token_ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """The set of these tokens, uint32 [words]; ids outside of the vocabulary are left out."""
    mask = np.zeros(num_words(vocab_size), np.uint32)
    for token in token_ids:
        if 0 <= token < vocab_size:
            mask[token >> 5] |= np.uint32(1 << (token & 31))
    return mask


def all_tokens(vocab_size: int) -> np.ndarray:
    """The whole vocabulary, uint32 [words]."""
    mask = np.full(num_words(vocab_size), 0xFFFFFFFF, np.uint32)
    if vocab_size % 32:
        mask[-1] = (1 << vocab_size % 32) - 1
    return mask
