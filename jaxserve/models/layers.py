"""The pieces that every family's layer is put together from: plain functions of arrays."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.models.config import Activation, RopeScaling

WEIGHT_FIRST_TOKENS = 64


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [tokens, in...] times weight [out..., in...] -> [tokens, out...]."""
    on_cpu = _weight_first if x.shape[0] <= WEIGHT_FIRST_TOKENS else _flattened
    return lax.platform_dependent(x, weight, cpu=on_cpu, default=_activations_first)


def _activations_first(x: jax.Array, weight: jax.Array) -> jax.Array:
    inputs = tuple(range(weight.ndim - x.ndim + 1, weight.ndim))
    contract = (tuple(range(1, x.ndim)), inputs)
    return lax.dot_general(x, weight, (contract, ((), ())), preferred_element_type=x.dtype)


def _weight_first(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The same with rows of weights as the left operand.

    XLA:CPU's matmul of a few columns of activations is up to 2x faster this way round; the
    barrier keeps XLA from turning it back when it sees the transpose.
    """
    inputs = tuple(range(weight.ndim - x.ndim + 1, weight.ndim))
    contract = (inputs, tuple(range(1, x.ndim)))
    out = lax.dot_general(weight, x, (contract, ((), ())), preferred_element_type=x.dtype)
    return jnp.moveaxis(lax.optimization_barrier(out), -1, 0)


def _flattened(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The same as a product of matrices.

    XLA:CPU copies a transpose of every weight of more dimensions. Elsewhere it does not, and
    merged dimensions could not be split over a mesh.
    """
    inputs = weight.ndim - x.ndim + 1
    size = math.prod(x.shape[1:])
    out = _activations_first(x.reshape(-1, size), weight.reshape(-1, size))
    return out.reshape(x.shape[0], *weight.shape[:inputs])


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale.astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Angle per position of each rotated pair: float32 [head_dim / 2].

    Source: RoFormer (Su et al., 2021); `llama3` scaling as in Llama 3.1's release.
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    wavelength = 2 * math.pi / frequency
    low = scaling.original_max_len / scaling.low_freq_factor
    high = scaling.original_max_len / scaling.high_freq_factor
    blend = (scaling.original_max_len / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * frequency / scaling.factor + blend * frequency
    return jnp.where(
        wavelength > low,
        frequency / scaling.factor,
        jnp.where(wavelength < high, frequency, blended),
    )


def rope_table(positions: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every token's angles: float32 [tokens, head_dim / 2] each."""
    angle = positions[:, None].astype(jnp.float32) * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding of x [tokens, ..., head_dim]; pairs are (i, i + head_dim / 2)."""
    shape = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1] // 2)
    cos, sin = (part.reshape(shape) for part in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def gated_mlp(
    x: jax.Array, gate_up: jax.Array, down: jax.Array, activation: Activation
) -> jax.Array:
    """x [tokens, E] -> [tokens, E]; gate_up is [2, F, E], down is [E, F]."""
    both = linear(x, gate_up)  # [tokens, 2, F]
    gate, up = both[:, 0], both[:, 1]
    gate = jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)
    return linear(gate * up, down)
