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
            int8, or float8_e4m3fn, or its bits; K and V may be joined (`pool_parts`).
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


def pool_parts(head_dim: int, *, joined: bool) -> tuple[int, int]:
    """The sizes of a pool's third axis and of its last one.

    Args:
        head_dim: of K and of V.
        joined: whether K and V lie side by side on the last axis, the third one being of size 1. A
            TPU's memory has its last axis in whole lanes of 128: two heads of 64 fill them, where
            each by itself would be padded, and the pool take twice its size and time to read.
    """
    return (1, 2 * head_dim) if joined else (2, head_dim)


def is_joined(pool: Any) -> bool:
    """Whether K and V lie side by side in a pool (see `pool_parts`)."""
    return pool.shape[2] == 1


def head_dim_of(pool: Any) -> int:
    """The size of a head of K, or of V, in a pool."""
    return pool.shape[5] // (2 if is_joined(pool) else 1)


def join(kv: jax.Array) -> jax.Array:
    """K and V [..., 2, kv_heads, head_dim] side by side: [..., 1, kv_heads, 2 * head_dim]."""
    return jnp.concatenate([kv[..., :1, :, :], kv[..., 1:, :, :]], axis=-1)


def separate(pages: jax.Array) -> jax.Array:
    """Joined pages [..., 1, kv_heads, page_size, 2 * head_dim] as [..., 2, ..., head_dim]."""
    return jnp.concatenate(jnp.split(pages, 2, axis=-1), axis=-4)


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
    """Rows of K and V as a pool has them: rounded to its type, or codes and scales.

    Args:
        x: floating, [..., 2, kv_heads, head_dim].
        pool: where they go.

    Returns:
        [..., parts, kv_heads, width] (see `pool_parts`), and scales [..., 2, kv_heads].
    """
    scales = None
    if isinstance(pool, KvPages):
        x, scales = quantise(x, values_dtype(pool.values.dtype))
    values = to_pool(join(x) if is_joined(pool) else x, pool.dtype)
    return values if scales is None else KvPages(values, scales)


def loaded(values: jax.Array, scales: jax.Array | None) -> jax.Array:
    """What was read from a pool, as numbers: in its own type, or float32 if it is quantised.

    Args:
        values: [..., head_dim], as the pool has them.
        scales: [...]; None if it has none.
    """
    numbers = from_pool(values)
    return numbers if scales is None else numbers.astype(jnp.float32) * scales[..., None]
