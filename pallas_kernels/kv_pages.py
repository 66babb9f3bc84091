"""A KV pool of 8-bit values, with one scale per token and KV head.

Each K or V of one token and head is quantised by itself as it is written, so that what is read
later depends on the token and its position alone: not on its chunk, its page or its neighbours.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_batch import from_pool, to_pool, values_dtype

SCALE_DTYPE = np.dtype(np.float32)
_FP8 = jnp.dtype(jnp.float8_e4m3fn)
_LARGEST = {jnp.dtype(jnp.int8): 127.0, _FP8: float(jnp.finfo(_FP8).max)}


class KvPages(NamedTuple):
    """A quantised KV pool: a value is its code times its token's scale.

    Attributes:
        values: as `PagedBatch` has the pool: [layers, pages, 2, kv_heads, page_size, head_dim] of
            int8, or float8_e4m3fn, or its bits.
        scales: float32 [layers, pages, 2, kv_heads, page_size].
    """

    values: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """Of the array of values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes


KvPool = jax.Array | KvPages  # a pool of floats is an array


def is_quantised(dtype: jax.typing.DTypeLike) -> bool:
    """Whether values of a type have scales."""
    return values_dtype(dtype) in _LARGEST


def check_scales(pool: KvPool) -> None:
    """Whether a pool has scales if and only if its values need them.

    Raises:
        ValueError: it does not.
    """
    name = values_dtype(pool.dtype).name
    if is_quantised(pool.dtype) and not isinstance(pool, KvPages):
        raise ValueError(f"KV pages of {name} have scales: give KvPages")
    if isinstance(pool, KvPages) and not is_quantised(pool.dtype):
        raise ValueError(f"KV pages of {name} have no scales: give the array alone")


def kv_dtype_name(dtype: jax.typing.DTypeLike) -> str:
    """What options call a type of KV: "fp8", or NumPy's name."""
    return "fp8" if jnp.dtype(dtype) == _FP8 else jnp.dtype(dtype).name


def kv_dtype_of(name: str) -> np.dtype:
    """The type that options call so; the inverse of `kv_dtype_name`."""
    return _FP8 if name == "fp8" else jnp.dtype(name)


def kv_token_bytes(dtype: jax.typing.DTypeLike, width: int) -> int:
    """Bytes of K or V of one token and head, its scale included.

    Args:
        dtype: of the values.
        width: of a head, as it lies in memory.
    """
    scale = SCALE_DTYPE.itemsize if is_quantised(dtype) else 0
    return width * jnp.dtype(dtype).itemsize + scale


def scales_of(pool: Any) -> Any:
    """A pool's scales; None if it has none."""
    return pool.scales if isinstance(pool, KvPages) else None


def values_of(pool: Any) -> Any:
    """A pool's array of values."""
    return pool.values if isinstance(pool, KvPages) else pool


def quantise(x: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of rows.

    Args:
        x: floating, [..., head_dim].
        dtype: of the codes: int8, or float8_e4m3fn.

    Returns:
        Codes [..., head_dim], rounded to the nearest, and float32 scales [...]: the largest number
        of a row has the largest code.
    """
    x, dtype = x.astype(jnp.float32), jnp.dtype(dtype)
    most = _LARGEST[dtype]
    scales = jnp.max(jnp.abs(x), axis=-1) * jnp.float32(1 / most)
    codes = jnp.clip(x / jnp.where(scales == 0, 1, scales)[..., None], -most, most)
    return (jnp.round(codes) if dtype == jnp.int8 else codes).astype(dtype), scales


def stored(x: jax.Array, pool: KvPool) -> KvPool:
    """Rows [..., head_dim] as a pool has them: rounded to its type, or codes and scales."""
    if not isinstance(pool, KvPages):
        return to_pool(x, pool.dtype)
    codes, scales = quantise(x, values_dtype(pool.values.dtype))
    return KvPages(to_pool(codes, pool.values.dtype), scales)


def loaded(values: jax.Array, scales: jax.Array | None) -> jax.Array:
    """What was read from a pool, as numbers: in its own type, or float32 if it is quantised.

    Args:
        values: [..., head_dim], as the pool has them.
        scales: [...]; None if it has none.
    """
    numbers = from_pool(values)
    return numbers if scales is None else numbers.astype(jnp.float32) * scales[..., None]
