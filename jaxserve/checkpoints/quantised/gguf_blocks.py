"""Blocks of a GGUF tensor, moved into jaxserve's layouts without a detour by float.

`Q4_0`, `Q4_1`, `Q5_0`, `Q5_1` and `Q8_0` are copied: they hold in a block what
`pallas_kernels.weights` holds in three arrays. Of the K types the codes are reordered, and a scale
(and minimum), which is there a float16 of 256 numbers times a small integer of 16 or 32, becomes
that product in float32, where it is exact: 11 bits by 6, or by 8, are less than 24.

The format: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

from pallas_kernels.weights import BLOCK, Format, Quantised

_LOW, _HIGH = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0xF0F0F0F0F0F0F0F0)
_FOUR = np.uint64(4)
_SWAPS = [  # how far, and which bits
    (np.uint64(7), np.uint64(0x00AA00AA00AA00AA)),
    (np.uint64(14), np.uint64(0x0000CCCC0000CCCC)),
    (np.uint64(28), np.uint64(0x00000000F0F0F0F0)),
]
_CHUNK = 2**9  # blocks at a time: what is made of them on the way stays in the cache

_D, _M = ("d", "<f2"), ("m", "<f2")
_NIBBLES, _FIFTH = ("q", "V16"), ("h", "V4")  # opaque: NumPy copies them as a whole, and fast


@dataclasses.dataclass(frozen=True)
class BlockType:
    """One of GGUF's types of blocks.

    Attributes:
        block: what lies in a block of the file.
        size: numbers in it.
        format: that holds the same numbers.
        values: what lies in `values` for every BLOCK inputs.
        move: takes blocks [n], and writes values [n, size / BLOCK], scales [n, size / group] and
            minimums, if the format has them.
    """

    block: np.dtype
    size: int
    format: Format
    values: np.dtype
    move: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None], None]


def quantised_format(kind: Kind) -> Format | None:
    """The format that `read_blocks` gives a type of tensor; None if it does not take the type."""
    found = _TYPES.get(kind)
    return None if found is None else found.format


def read_blocks(raw: np.ndarray, kind: Kind) -> Quantised:
    """Rows of a tensor as a weight, with exactly the numbers that `gguf.quants.dequantize` gives.

    Args:
        raw: uint8 [..., bytes of a row], such as some rows of a mapped file.
        kind: one that has a `quantised_format`.

    Returns:
        [..., numbers of a row], in NumPy.
    """
    found = _TYPES[kind]
    outputs, format = raw.shape[:-1], found.format
    blocks = np.ascontiguousarray(raw).reshape(-1).view(found.block)
    count, groups = len(blocks), found.size // format.group
    values = np.empty((count, found.size // BLOCK), found.values)
    scales = np.empty((count, groups), format.scale)
    minimums = np.empty_like(scales) if format.has_minimums else None
    for start in range(0, count, _CHUNK):
        part = slice(start, start + _CHUNK)
        lows = None if minimums is None else minimums[part]
        found.move(blocks[part], values[part], scales[part], lows)
    bytes_ = values.view(np.uint8).view(format.value_type).reshape(*outputs, -1)
    scales = scales.reshape(*outputs, -1)
    minimums = None if minimums is None else minimums.reshape(scales.shape)
    weight = Quantised(bytes_, scales, minimums, format)
    weight.check()
    return weight


def _copy(
    blocks: np.ndarray, values: np.ndarray, scales: np.ndarray, minimums: np.ndarray | None
) -> None:
    for field in values.dtype.names or ():
        values[field][:, 0] = blocks[field]
    scales[:, 0] = blocks["d"]
    if minimums is not None:
        minimums[:, 0] = blocks["m"]


def _columns(field: np.ndarray, kind: type[np.generic]) -> np.ndarray:
    """An opaque field [n] as [numbers in it, n]: long rows, so that NumPy's loops are long."""
    return np.ascontiguousarray(np.ascontiguousarray(field).view(kind).reshape(len(field), -1).T)


def _move_nibbles(field: np.ndarray, values: np.ndarray, apart: int) -> None:
    """Two numbers of every byte: the low nibbles of 32 bytes are a block, and the high ones.

    Args:
        field: opaque [n], of a multiple of 32 bytes.
        values: [n, blocks], their fields `a` and `b` are written.
        apart: high nibbles are so many blocks behind the low ones.
    """
    words = _columns(field, np.uint64).reshape(-1, 2, 2, len(field))
    first, second = words[:, 0], words[:, 1]
    low = (first & _LOW) | ((second & _LOW) << _FOUR)
    high = ((first & _HIGH) >> _FOUR) | (second & _HIGH)
    for i in range(len(words)):
        at = i // apart * 2 * apart + i % apart
        for block, part in ((at, low[i]), (at + apart, high[i])):
            values["a"][:, block], values["b"][:, block] = part


def _turned_bits(field: np.ndarray) -> np.ndarray:
    """Bit i of 32 bytes together as four bytes: opaque [n] to V4 [bytes / 32, 8, n].

    Each eight bytes are a matrix of 8 by 8 bits, transposed by swapping ever larger quarters.
    """
    words = _columns(field, np.uint64)
    for shift, mask in _SWAPS:
        swapped = (words ^ (words >> shift)) & mask
        words = words ^ swapped ^ (swapped << shift)  # never in place: it may be the file
    octets = words.view(np.uint8).reshape(-1, 4, len(field), 8)
    return np.ascontiguousarray(octets.transpose(0, 3, 2, 1)).view("V4")[..., 0]


def _move_scales(blocks: np.ndarray, scales: np.ndarray, minimums: np.ndarray) -> None:
    """Scales and minimums of Q4_K and Q5_K, from 12 bytes of six-bit numbers.

    Bytes 0 to 3 hold the first four scales, 4 to 7 the first four minimums; the other four of each
    have their low nibbles in bytes 8 to 11 and their upper two bits on top of the first eight.
    """
    first, second, low = _columns(blocks["s"], np.uint8).reshape(3, 4, -1)
    d, m = blocks["d"].astype(np.float32), -blocks["m"].astype(np.float32)
    scales[:, :4] = ((first & 63) * d).T
    scales[:, 4:] = (((low & 15) | (first >> 6 << 4)) * d).T
    minimums[:, :4] = ((second & 63) * m).T
    minimums[:, 4:] = (((low >> 4) | (second >> 6 << 4)) * m).T


def _move_q4_k(
    blocks: np.ndarray, values: np.ndarray, scales: np.ndarray, minimums: np.ndarray | None
) -> None:
    _move_nibbles(blocks["q"], values, 1)
    assert minimums is not None
    _move_scales(blocks, scales, minimums)


def _move_q5_k(
    blocks: np.ndarray, values: np.ndarray, scales: np.ndarray, minimums: np.ndarray | None
) -> None:
    _move_q4_k(blocks, values, scales, minimums)
    (bits,) = _turned_bits(blocks["h"])  # bit i is of block i
    for i, part in enumerate(bits):
        values["h"][:, i] = part


def _move_q6_k(
    blocks: np.ndarray, values: np.ndarray, scales: np.ndarray, minimums: np.ndarray | None
) -> None:
    # Each half of 128 numbers has 64 bytes of nibbles, and 32 of upper bits: two for each number.
    _move_nibbles(blocks["q"], values, 2)
    for half, bits in enumerate(_turned_bits(blocks["h"])):
        for i in range(4):
            values["h"][:, half * 4 + i], values["i"][:, half * 4 + i] = bits[2 * i : 2 * i + 2]
    scales[:] = (_columns(blocks["s"], np.int8) * blocks["d"].astype(np.float32)).T


def _type(
    fields: list, size: int, format: Format, values: list, move: Callable = _copy
) -> BlockType:
    return BlockType(np.dtype(fields), size, format, np.dtype(values), move)


_INT4, _INT5 = [_NIBBLES], [_NIBBLES, _FIFTH]
_WORDS = [("a", "<u8"), ("b", "<u8")]  # nibbles
_TYPES: Mapping[Kind, BlockType] = {
    Kind.Q8_0: _type([_D, ("q", "V32")], 32, Format("int8", 32, "float16"), [("q", "V32")]),
    Kind.Q4_0: _type([_D, _NIBBLES], 32, Format("int4", 32, "float16"), _INT4),
    Kind.Q4_1: _type([_D, _M, _NIBBLES], 32, Format("int4", 32, "float16", True), _INT4),
    Kind.Q5_0: _type([_D, _FIFTH, _NIBBLES], 32, Format("int5", 32, "float16"), _INT5),
    Kind.Q5_1: _type([_D, _M, _FIFTH, _NIBBLES], 32, Format("int5", 32, "float16", True), _INT5),
    Kind.Q4_K: _type(
        [_D, _M, ("s", "V12"), ("q", "V128")],
        256, Format("int4", 32, "float32", True), _WORDS, _move_q4_k,
    ),
    Kind.Q5_K: _type(
        [_D, _M, ("s", "V12"), ("h", "V32"), ("q", "V128")],
        256, Format("int5", 32, "float32", True), [*_WORDS, _FIFTH], _move_q5_k,
    ),
    Kind.Q6_K: _type(
        [("q", "V128"), ("h", "V64"), ("s", "V16"), _D],
        256, Format("int6", 16, "float32"), [*_WORDS, _FIFTH, ("i", "V4")], _move_q6_k,
    ),
}  # fmt: skip
