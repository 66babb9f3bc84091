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


def rms_norm(
    x: jax.Array, scale: jax.Array, eps: float, axes: int | tuple[int, ...] = -1
) -> jax.Array:
    """Root-mean-square norm over the last axis (or those named), computed in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=axes, keepdims=True) + eps)
    return (wide * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """Norm by mean and variance over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    wide = wide * scale.astype(jnp.float32)
    return (wide if bias is None else wide + bias.astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(rotated: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Angle per position of each pair of `rotated` dimensions: float32 [rotated / 2].

    Source: RoFormer (Su et al., 2021); `llama3` scaling as in Llama 3.1's release, `yarn` as in
    YaRN (Peng et al., 2023).
    """
    frequency = theta ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "divisors":
        return frequency / jnp.asarray(scaling.divisors, jnp.float32)
    if scaling.kind == "yarn":
        kept = 1.0 - _yarn_ramp(rotated, theta, scaling)
        return frequency * (kept + (1.0 - kept) / scaling.factor)
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


def _yarn_ramp(rotated: int, theta: float, scaling: RopeScaling) -> jax.Array:
    """From 0 for the frequencies that are kept to 1 for those that are divided: [rotated / 2]."""

    def index(turns: float) -> float:
        """Of the frequency that turns so often, which need not be a whole number."""
        wavelength = scaling.original_max_len / turns
        return rotated * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    first, last = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.whole_betas:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotated - 1)
    width = last - first if last != first else 1e-3
    return jnp.clip((jnp.arange(rotated // 2, dtype=jnp.float32) - first) / width, 0.0, 1.0)


def rope_table(
    positions: jax.Array, frequencies: jax.Array, factor: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, times `factor`, of every token's angles: float32 [tokens, pairs] each."""
    angle = positions[:, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """Rotary embedding of x [tokens, ..., head_dim] by cosines and sines [tokens, pairs].

    The first 2 * pairs dimensions rotate, i together with i + pairs. Without a table nothing does.
    """
    if table is None:
        return x
    pairs = table[0].shape[-1]
    cos, sin = (part.reshape(x.shape[0], *(1,) * (x.ndim - 2), pairs) for part in table)
    turning, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    first, second = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    rotated = rotated.astype(x.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


def activate(x: jax.Array, activation: Activation) -> jax.Array:
    """An MLP's activation."""
    return jax.nn.silu(x) if activation == "silu" else jax.nn.gelu(x, approximate=True)
