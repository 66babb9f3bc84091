"""Small unsigned codes packed into 32-bit words, the first in the lowest bits."""

import numpy as np

WORD_BITS = 32
_TILE = 64  # rows and columns that are transposed at a time, so that both stay in the cache
_PART = 2**13  # words at a time, for the same reason
_FOUR = np.uint64(4)
_SPREADS = [  # how far half of what is left moves up, and what is kept
    (np.uint64(16), np.uint64(0x0000FFFF0000FFFF)),
    (np.uint64(8), np.uint64(0x00FF00FF00FF00FF)),
    (_FOUR, np.uint64(0x0F0F0F0F0F0F0F0F)),
]


def transposed(words: np.ndarray) -> np.ndarray:
    """A matrix of words with rows for columns, several times as fast as NumPy copies `words.T`."""
    rows, columns = words.shape
    out = np.empty((columns, rows), np.uint32)
    for i in range(0, rows, _TILE):
        for j in range(0, columns, _TILE):
            out[j : j + _TILE, i : i + _TILE] = words[i : i + _TILE, j : j + _TILE].T
    return out


def nibble_blocks(words: np.ndarray) -> np.ndarray:
    """Words of eight codes of four bits as the blocks of `pallas_kernels.weights`.

    Args:
        words: int32 or uint32 [rows, in / 8].

    Returns:
        uint8 [rows, in / 2]: of each 32 codes the first 16 in the low halves of 16 bytes, the
        others in the high ones.
    """
    rows, per_row = words.shape
    out = np.empty((rows, per_row // 4, 2), np.uint64)
    step = max(1, _PART // max(1, per_row))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        spread = np.ascontiguousarray(words[part]).view(np.uint32).astype(np.uint64)
        for shift, kept in _SPREADS:
            spread = (spread | (spread << shift)) & kept  # at last a code in every byte
        halves = spread.reshape(-1, per_row // 4, 2, 2)
        np.bitwise_or(halves[:, :, 0], halves[:, :, 1] << _FOUR, out=out[part])
    return out.reshape(rows, -1).view(np.uint8)


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
