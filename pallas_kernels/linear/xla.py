"""A linear layer in plain XLA, the way round that each platform multiplies fastest."""

import math

import jax
import jax.numpy as jnp
from jax import lax

WEIGHT_FIRST_TOKENS = 64


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`pallas_kernels.linear.linear` in plain XLA."""
    on_cpu = _weight_first if x.shape[0] <= WEIGHT_FIRST_TOKENS else _flattened
    return lax.platform_dependent(x, weight, cpu=on_cpu, default=_activations_first)


def _activations_first(x: jax.Array, weight: jax.Array) -> jax.Array:
    inputs = tuple(range(weight.ndim - x.ndim + 1, weight.ndim))
    contract = (tuple(range(1, x.ndim)), inputs)
    return lax.dot_general(x, weight, (contract, ((), ())), preferred_element_type=x.dtype)


def _weight_first(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The product with rows of weights as the left operand.

    XLA:CPU's matmul of a few columns of activations is up to 2x faster this way round; the
    barrier keeps XLA from turning it back when it sees the transpose.
    """
    inputs = tuple(range(weight.ndim - x.ndim + 1, weight.ndim))
    contract = (inputs, tuple(range(1, x.ndim)))
    out = lax.dot_general(weight, x, (contract, ((), ())), preferred_element_type=x.dtype)
    return jnp.moveaxis(lax.optimization_barrier(out), -1, 0)


def _flattened(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The product as one of matrices.

    XLA:CPU copies a transpose of every weight of more dimensions. Elsewhere it does not, and
    merged dimensions could not be split over a mesh.
    """
    inputs = weight.ndim - x.ndim + 1
    size = math.prod(x.shape[1:])
    out = _activations_first(x.reshape(-1, size), weight.reshape(-1, size))
    return out.reshape(x.shape[0], *weight.shape[:inputs])
