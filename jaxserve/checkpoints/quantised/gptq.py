"""Weights of GPTQ (AutoGPTQ, GPTQModel): codes with a scale and a zero point for each group.

`qweight` int32 [in * bits / 32, out], `qzeros` int32 [groups, out * bits / 32], `scales`
[groups, out], `g_idx` int32 [in]; a number is `(code - zero) * scale`. Version 1 of the format
stores one less than each zero point, version 2 the zero point.

With activation order (`desc_act`) `g_idx` gives each input a group of its own choosing. The columns
of the weight are then put in the order of their groups, and `order` says which input each takes:
the product is that of `x[..., order]`, or of x itself where the rows of the weight before it are
taken in that order (`rows.take_rows`), as those of `gate` and `up` can be for `down`.
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
    group_order,
    num_groups,
    sizes_of,
    word_values,
)
from jaxserve.checkpoints.quantised.words import WORD_BITS, transposed, unpack_columns
from jaxserve.core.errors import CheckpointError
from pallas_kernels.weights import Format, Quantised

_G_IDX = "g_idx"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gptq(Scheme):
    """Two, four or eight bits, in GPTQ's layout.

    Attributes:
        bits: of a code.
        group: inputs that share a scale; None for all.
        symmetric: every zero point is in the middle.
        version: of the format, 1 or 2.
    """

    bits: int
    group: int | None
    symmetric: bool
    version: int

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
        words, rows = sizes_of(found, "qweight")
        return rows, words * WORD_BITS // self.bits

    def tensors(self, shape: Shape) -> dict[str, Shapes]:
        """Shapes of `qweight`, `qzeros` and `scales`."""
        rows, columns = shape
        groups, per_word = num_groups(columns, self.group), WORD_BITS // self.bits
        if rows % per_word or columns % per_word:
            raise CheckpointError(f"GPTQ stores whole words of {per_word} codes, not {shape}")
        return {
            "qweight": ((columns // per_word, rows),),
            "qzeros": ((groups, rows // per_word),),
            "scales": ((groups, rows),),
        }

    def optional(self, shape: Shape) -> dict[str, Shapes]:
        """Shape of `g_idx`."""
        return {_G_IDX: ((shape[1],),)}

    def format(self, shape: Shape, scales: str) -> Format:
        """Four or eight bits, with minimums unless it is symmetric."""
        return affine_format(self.bits, self.group, shape[1], scales, symmetric=self.symmetric)

    def read(
        self, tensors: Mapping[str, np.ndarray], shape: Shape, rows: slice = slice(None)
    ) -> Quantised:
        """Take the codes as they are; minimums are zero points times scales."""
        first, last, _ = rows.indices(shape[0])
        scales = tensors["scales"][:, first:last].T
        zeros: np.ndarray | None = self._zeros(tensors["qzeros"], first, last)
        if self.symmetric:
            middle = 2 ** (self.bits - 1)
            if not (zeros == middle).all():
                raise CheckpointError(
                    f"the configuration says sym, which is a zero point of {middle} everywhere, "
                    f"but qzeros says {zeros.min()} to {zeros.max()}"
                )
            zeros = None
        format, order = self.format(shape, scales.dtype.name), self.order(tensors)
        words = transposed(tensors["qweight"][:, first:last])
        values = word_values(words, self.bits, shape[1], order, format)
        return affine_weight(values, scales, zeros, format)

    def order(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """The order of `g_idx`, where it is there."""
        return group_order(tensors[_G_IDX], self.group) if _G_IDX in tensors else None

    def _zeros(self, words: np.ndarray, first: int, last: int) -> np.ndarray:
        """Zero points [last - first, groups] of those rows."""
        words = words.view(np.uint32)
        if self.version == 1:
            # It is written by taking one from every code of a whole word, with borrows.
            words = words + np.uint32((2**WORD_BITS - 1) // (2**self.bits - 1))
        return unpack_columns(words, self.bits, first, last)
