"""Weights of AutoAWQ's GEMM layout: four bits, a scale and a zero point for each group.

`qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8], `scales` [groups, out]; a number is
`(code - zero) * scale`. Of eight neighbouring outputs a word holds, from its lowest bits up, those
at places 0, 2, 4, 6, 1, 3, 5, 7.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxserve.checkpoints.quantised.scheme import (
    Scheme,
    Shape,
    Shapes,
    affine_format,
    affine_weight,
    num_groups,
    sizes_of,
)
from jaxserve.checkpoints.quantised.words import transposed
from jaxserve.core.errors import CheckpointError
from pallas_kernels.weights import BLOCK, Format, Quantised

_BITS = 4
_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
_PER_WORD = len(_PLACES)
_LOW = np.uint32(0x0F0F0F0F)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Awq(Scheme):
    """Four bits, with zero points, in AutoAWQ's GEMM layout.

    Attributes:
        group: inputs that share a scale; None for all.
    """

    group: int | None

    @property
    def mark(self) -> str:
        """`qweight`, packed integers."""
        return "qweight"

    @property
    def scales(self) -> str:
        """`scales`."""
        return "scales"

    def shape(self, found: Mapping[str, Shape]) -> Shape:
        """From `qweight`."""
        columns, words = sizes_of(found, "qweight")
        return words * _PER_WORD, columns

    def tensors(self, shape: Shape) -> dict[str, Shapes]:
        """Shapes of `qweight`, `qzeros` and `scales`."""
        rows, columns = shape
        if rows % _PER_WORD:
            raise CheckpointError(f"AWQ stores a multiple of {_PER_WORD} outputs, not {rows}")
        groups = num_groups(columns, self.group)
        return {
            "qweight": ((columns, rows // _PER_WORD),),
            "qzeros": ((groups, rows // _PER_WORD),),
            "scales": ((groups, rows),),
        }

    def format(self, shape: Shape, scales: str) -> Format:
        """Four bits with minimums."""
        return affine_format(_BITS, self.group, shape[1], scales, symmetric=False)

    def read(
        self, tensors: Mapping[str, np.ndarray], shape: Shape, rows: slice = slice(None)
    ) -> Quantised:
        """Take the codes as they are; minimums are zero points times scales."""
        first, last, _ = rows.indices(shape[0])
        words = slice(first // _PER_WORD, -(-last // _PER_WORD))
        inside = slice(first - words.start * _PER_WORD, last - words.start * _PER_WORD)
        scales = tensors["scales"][:, first:last].T
        format = self.format(shape, scales.dtype.name)
        values = _blocks(transposed(tensors["qweight"][:, words]))[inside]
        zeros = _codes(transposed(tensors["qzeros"][:, words]))[inside]
        return affine_weight(values, scales, zeros, format)


def _codes(words: np.ndarray) -> np.ndarray:
    """Words [out / 8, n] as codes [out, n]."""
    out = np.empty((len(words), _PER_WORD, words.shape[1]), np.uint8)
    for i, place in enumerate(_PLACES):
        out[:, place] = words >> np.uint32(_BITS * i) & np.uint32(15)
    return out.reshape(-1, words.shape[1])


def _blocks(words: np.ndarray) -> np.ndarray:
    """Words [out / 8, in] as the blocks of `pallas_kernels.weights`, uint8 [out, in / 2].

    Of each 32 inputs the first 16 and the last 16 are put together, eight outputs at a time; then
    a byte holds two inputs of one output, and bytes go to their outputs.
    """
    halves = words.reshape(len(words), -1, 2, BLOCK // 2)
    first, second = halves[:, :, 0], halves[:, :, 1]
    even = (first & _LOW) | ((second & _LOW) << np.uint32(_BITS))
    odd = ((first & ~_LOW) >> np.uint32(_BITS)) | (second & ~_LOW)
    out = np.empty((len(words), _PER_WORD, words.shape[1] // 2), np.uint8)
    for start, octets in enumerate((even, odd)):
        for i, place in enumerate(_PLACES[start::2]):
            out[:, place] = octets.view(np.uint8).reshape(len(words), -1, 4)[..., i]
    return out.reshape(-1, words.shape[1] // 2)
