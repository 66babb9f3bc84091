"""A linear layer in plain XLA, the way round that each platform multiplies fastest."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.linear.activations import quantise_activations, round_activations
from pallas_kernels.weights import Quantised

WEIGHT_FIRST_TOKENS = 64


def linear(
    x: jax.Array, weight: jax.Array | Quantised, activations: str, _num_tokens: jax.Array | None
) -> jax.Array:
    """`pallas_kernels.linear.linear` in plain XLA, of all tokens."""
    if not isinstance(weight, Quantised):
        return _multiply(x, weight)
    flat = x.reshape(x.shape[0], -1)
    outputs = len(weight.shape) - 1
    if weight.format.group or weight.format.has_minimums:
        if activations == "int8":
            # Products of codes would have to be kept for every group. In float32 they are exact.
            numbers = round_activations(flat, weight.format)
            out = _multiply(numbers, weight.dequantise(), precision="highest")
        else:
            out = _multiply(flat, weight.dequantise().astype(x.dtype))
        return out.astype(x.dtype)
    scales = weight.scales[..., 0].astype(jnp.float32)
    codes = weight.codes()
    if weight.format.offset:
        codes = codes.astype(jnp.int8) - np.int8(weight.format.offset)
    if activations == "float":
        out = _multiply(flat, codes.astype(x.dtype), preferred=jnp.float32)
        return (out * scales).astype(x.dtype)
    x_codes, x_scales = quantise_activations(flat, weight.format)
    contract = ((1,), (outputs,))
    dots = lax.dot_general(x_codes, codes, (contract, ((), ())), preferred_element_type=jnp.int32)
    x_scales = x_scales.reshape(-1, *(1,) * outputs)
    return (dots.astype(jnp.float32) * scales * x_scales).astype(x.dtype)


def _multiply(x: jax.Array, weight: jax.Array, **how: Any) -> jax.Array:
    """x [tokens, in...] times weight [out..., in...]; `how` is for `_activations_first`."""
    on_cpu = _weight_first if x.shape[0] <= WEIGHT_FIRST_TOKENS else _flattened
    ways = {"cpu": on_cpu, "default": _activations_first}
    return lax.platform_dependent(
        x, weight, **{name: functools.partial(way, **how) for name, way in ways.items()}
    )


def _activations_first(
    x: jax.Array, weight: jax.Array, *, preferred: Any = None, precision: Any = None
) -> jax.Array:
    inputs = tuple(range(weight.ndim - x.ndim + 1, weight.ndim))
    contract = (tuple(range(1, x.ndim)), inputs)
    return lax.dot_general(
        x, weight, (contract, ((), ())), precision, preferred_element_type=preferred or x.dtype
    )


def _weight_first(
    x: jax.Array, weight: jax.Array, *, preferred: Any = None, precision: Any = None
) -> jax.Array:
    """The product with rows of weights as the left operand.

    XLA:CPU's matmul of a few columns of activations is up to 2x faster this way round; the
    barrier keeps XLA from turning it back when it sees the transpose.
    """
    inputs = tuple(range(weight.ndim - x.ndim + 1, weight.ndim))
    contract = (inputs, tuple(range(1, x.ndim)))
    out = lax.dot_general(
        weight, x, (contract, ((), ())), precision, preferred_element_type=preferred or x.dtype
    )
    return jnp.moveaxis(lax.optimization_barrier(out), -1, 0)


def _flattened(x: jax.Array, weight: jax.Array, **how: Any) -> jax.Array:
    """The product as one of matrices.

    XLA:CPU copies a transpose of every weight of more dimensions. Elsewhere it does not, and
    merged dimensions could not be split over a mesh.
    """
    inputs = weight.ndim - x.ndim + 1
    size = math.prod(x.shape[1:])
    out = _activations_first(x.reshape(-1, size), weight.reshape(-1, size), **how)
    return out.reshape(x.shape[0], *weight.shape[:inputs])
