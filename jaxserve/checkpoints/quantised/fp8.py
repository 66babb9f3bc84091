"""Weights in float8_e4m3fn, with scales for a tensor, rows, groups or blocks.

`weight` [out, in] times its scale. Written by compressed-tensors (`float-quantized`), by vLLM's
and transformers' `fp8`, whose scales of blocks are called `weight_scale_inv`.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxserve.checkpoints.quantised.blocks import Blocks
from jaxserve.checkpoints.quantised.scheme import (
    Scheme,
    Shape,
    Shapes,
    checked_format,
    sizes_of,
)
from jaxserve.core.errors import CheckpointError
from pallas_kernels.weights import Format, Quantised, from_codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8(Scheme):
    """Numbers in float8_e4m3fn.

    Attributes:
        blocks: what shares a scale.
        scale: suffix of the tensor of scales.
    """

    blocks: Blocks
    scale: str = "weight_scale"

    @property
    def mark(self) -> str:
        """The name of its scales."""
        return self.scale

    @property
    def scales(self) -> str:
        """The name of its scales."""
        return self.scale

    def shape(self, found: Mapping[str, Shape]) -> Shape:
        """That of `weight`."""
        return sizes_of(found, "weight")

    def tensors(self, shape: Shape) -> dict[str, Shapes]:
        """Shapes of `weight` and its scales."""
        return {"weight": (shape,), self.scale: self.blocks.shapes(shape)}

    @property
    def unused(self) -> frozenset[str]:
        """Scales of activations and of the KV cache."""
        return frozenset({"input_scale", "output_scale", "k_scale", "v_scale"})

    def format(self, shape: Shape, scales: str) -> Format:
        """Float8, whose scales are float32 unless they are stored in 16 bits."""
        narrow = scales in ("float16", "bfloat16")
        group = self.blocks.group(shape[1])
        return checked_format("fp8", group, shape[1], scales if narrow else "float32")

    def read(
        self, tensors: Mapping[str, np.ndarray], shape: Shape, rows: slice = slice(None)
    ) -> Quantised:
        """Take the numbers as they are, and a scale for every group of every row."""
        weight, scales = tensors["weight"], tensors[self.scale]
        if weight.dtype.name != "float8_e4m3fn":
            raise CheckpointError(f"tensor weight has type {weight.dtype}, expected float8_e4m3fn")
        format = self.format(shape, scales.dtype.name)
        spread = self.blocks.spread(scales, shape, rows).astype(format.scale)
        return from_codes(np.ascontiguousarray(weight[rows]), spread, None, format)
