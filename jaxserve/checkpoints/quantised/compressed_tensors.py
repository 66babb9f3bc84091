"""Integer weights of compressed-tensors: packed into words, or a byte each.

Packed (`pack-quantized`): `weight_packed` int32 [out, in * bits / 32], the codes of a row from 0 on
and one after the other; `weight_zero_point` int32 [out * bits / 32, groups], packed down the rows.
A byte each (`int-quantized`, `naive-quantized`): `weight` int8 [out, in], around zero, and
`weight_zero_point` int8 in the shape of the scales. For both `weight_scale`, and with activation
order `weight_g_idx` int32 [in]. A number is `(code - zero) * scale`.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxserve.checkpoints.quantised.blocks import Blocks
from jaxserve.checkpoints.quantised.scheme import (
    Scheme,
    Shape,
    Shapes,
    affine_format,
    affine_values,
    affine_weight,
    group_order,
    sizes_of,
    word_values,
)
from jaxserve.checkpoints.quantised.words import WORD_BITS, unpack_columns
from jaxserve.core.errors import CheckpointError
from pallas_kernels.weights import Format, Quantised

_SCALE, _ZERO, _G_IDX, _SHAPE = (
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_shape",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compressed(Scheme):
    """Integers of two, four or eight bits.

    Attributes:
        bits: of a code.
        blocks: what shares a scale.
        symmetric: there are no zero points.
        packed: into words, not a byte each.
    """

    bits: int
    blocks: Blocks
    symmetric: bool
    packed: bool

    @property
    def mark(self) -> str:
        """What its kind of storage calls its values."""
        return "weight_packed" if self.packed else _SCALE

    @property
    def scales(self) -> str:
        """`weight_scale`."""
        return _SCALE

    def shape(self, found: Mapping[str, Shape]) -> Shape:
        """From the codes, which fill whole words in every format that holds them."""
        if not self.packed:
            return sizes_of(found, "weight")
        rows, words = sizes_of(found, "weight_packed")
        return rows, words * WORD_BITS // self.bits

    def tensors(self, shape: Shape) -> dict[str, Shapes]:
        """Shapes of the codes, the scales and the zero points."""
        rows, columns = shape
        scales = self.blocks.shapes(shape)
        per_word = WORD_BITS // self.bits
        if self.packed:
            found: dict[str, Shapes] = {"weight_packed": ((rows, -(-columns // per_word)),)}
        else:
            found = {"weight": (shape,)}
        found[_SCALE] = scales
        if not self.symmetric:
            packed = ((-(-rows // per_word), *size[1:]) for size in scales if size)
            found[_ZERO] = (*packed, *scales) if self.packed else scales
        return found

    def optional(self, shape: Shape) -> dict[str, Shapes]:
        """Shapes of `weight_g_idx` and `weight_shape`."""
        return {_G_IDX: ((shape[1],),), _SHAPE: ((2,),)}

    @property
    def unused(self) -> frozenset[str]:
        """What was calibrated for activations and the KV cache."""
        return frozenset({
            "input_scale", "input_zero_point", "input_global_scale", "output_scale",
            "output_zero_point", "k_scale", "v_scale",
        })  # fmt: skip

    def format(self, shape: Shape, scales: str) -> Format:
        """Four or eight bits, with minimums unless it is symmetric."""
        group = self.blocks.group(shape[1])
        return affine_format(self.bits, group, shape[1], scales, symmetric=self.symmetric)

    def read(
        self, tensors: Mapping[str, np.ndarray], shape: Shape, rows: slice = slice(None)
    ) -> Quantised:
        """Take the codes as they are; minimums are zero points times scales."""
        if _SHAPE in tensors and tuple(tensors[_SHAPE].tolist()) != tuple(shape):
            raise CheckpointError(f"weight_shape says {tensors[_SHAPE].tolist()}, not {shape}")
        scales = self.blocks.spread(tensors[_SCALE], shape, rows)
        zeros = None if self.symmetric else self._zeros(tensors[_ZERO], shape, rows)
        format, order = self.format(shape, scales.dtype.name), self.order(tensors)
        if self.packed:
            words = tensors["weight_packed"][rows]
            values = word_values(words, self.bits, shape[1], order, format)
        else:
            codes = self._from_zero(tensors["weight"][rows])
            codes = codes if order is None else np.take(codes, order, 1)
            values = affine_values(codes, self.bits, format)
        return affine_weight(values, scales, zeros, format)

    def order(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """The order of `weight_g_idx`, where it is there."""
        if _G_IDX not in tensors or (tensors[_G_IDX] == -1).all():  # -1: not used
            return None
        return group_order(tensors[_G_IDX], self.blocks.columns)

    def _zeros(self, zeros: np.ndarray, shape: Shape, rows: slice) -> np.ndarray:
        """Zero points [rows, groups] of some rows, from 0 on."""
        if zeros.dtype.itemsize != 4:
            return self._from_zero(self.blocks.spread(zeros, shape, rows))
        first, last, _ = rows.indices(shape[0])
        return unpack_columns(zeros.reshape(len(zeros), -1).T, self.bits, first, last)

    def _from_zero(self, codes: np.ndarray) -> np.ndarray:
        """Codes around zero (int8) as codes from 0 on (uint8)."""
        if codes.dtype != np.int8:
            raise CheckpointError(f"integer codes have type {codes.dtype}, expected int8")
        return codes.view(np.uint8) + np.uint8(2 ** (self.bits - 1))
