"""Small unsigned codes packed into 32-bit words, the first in the lowest bits."""

import numpy as np

WORD_BITS = 32


def unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Take words apart along the last axis.

    Args:
        words: int32 or uint32 [..., n].
        bits: of a code: 2, 4 or 8.

    Returns:
        uint8 [..., n * 32 / bits].
    """
    octets = np.ascontiguousarray(words).view(np.uint8)  # little-endian: the lowest bits first
    if bits == 8:
        return octets
    out = np.empty((*octets.shape, 8 // bits), np.uint8)
    for i in range(8 // bits):
        np.right_shift(octets, bits * i, out=out[..., i])
    out &= np.uint8(2**bits - 1)
    return out.reshape(*octets.shape[:-1], -1)


def unpack_columns(words: np.ndarray, bits: int, first: int, last: int) -> np.ndarray:
    """Some of the codes that each row of words [n, ...] holds, as rows: uint8 [last - first, n]."""
    per_word = WORD_BITS // bits
    start = first // per_word
    codes = unpack_words(words[:, start : -(-last // per_word)], bits)
    return np.ascontiguousarray(codes[:, first - start * per_word : last - start * per_word].T)
