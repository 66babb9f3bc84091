"""The pieces that every family's layer is put together from: plain functions of arrays."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxserve.models.config import Activation, RopeScaling

# x [tokens, in] times a weight [out..., in] -> [tokens, out...]; see `KernelBackend.linear`.
Linear = Callable[[jax.Array, nnx.Param], jax.Array]


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
    if scaling.kind == "divisors":
        return frequency / jnp.asarray(scaling.divisors, jnp.float32)
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
    x: jax.Array, gate_up: nnx.Param, down: nnx.Param, activation: Activation, linear: Linear
) -> jax.Array:
    """x [tokens, E] -> [tokens, E]; gate_up is [2, F, E], down is [E, F]."""
    both = linear(x, gate_up)  # [tokens, 2, F]
    gate, up = both[:, 0], both[:, 1]
    gate = jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)
    return linear(gate * up, down)
