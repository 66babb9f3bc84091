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
)
from jaxserve.core.errors import CheckpointError
from pallas_kernels.weights import Format, Quantised

_BITS = 4
_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
_PER_WORD = len(_PLACES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Awq(Scheme):
    """Four bits, with zero points, in AutoAWQ's GEMM layout.

    Attributes:
        group: inputs that share a scale; None for all.
    """

    group: int | None

    @property
    def mark(self) -> str:
        """See the base class."""
        return "qweight"

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
        return affine_format(_BITS, self.group, scales, symmetric=False)

    def read(
        self, tensors: Mapping[str, np.ndarray], shape: Shape, rows: slice = slice(None)
    ) -> Quantised:
        """Take the codes as they are; minimums are zero points times scales."""
        first, last, _ = rows.indices(shape[0])
        scales = tensors["scales"][:, first:last].T
        codes = _rows(tensors["qweight"], first, last)
        zeros = _rows(tensors["qzeros"], first, last)
        return affine_weight(codes, scales, zeros, _BITS, self.format(shape, scales.dtype.name))


def _rows(words: np.ndarray, first: int, last: int) -> np.ndarray:
    """Codes of some outputs from words [n, out / 8]: uint8 [last - first, n]."""
    start = first // _PER_WORD
    turned = words[:, start : -(-last // _PER_WORD)].T.view(np.uint32)
    out = np.empty((len(turned), _PER_WORD, turned.shape[1]), np.uint8)
    for i, place in enumerate(_PLACES):
        out[:, place] = turned >> np.uint32(4 * i) & np.uint32(15)
    at = start * _PER_WORD
    return out.reshape(-1, turned.shape[1])[first - at : last - at]
