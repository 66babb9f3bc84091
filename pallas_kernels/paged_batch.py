"""The ragged batch that every kernel here takes: whose tokens they are, and where KV lives."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding


class PagedBatch(NamedTuple):
    """A ragged batch of query tokens over a paged KV cache.

    Row s owns the query tokens query_start[s] .. query_start[s] + query_len[s] - 1 of a flat
    [tokens, ...] array; they are the last query_len[s] of its context_len[s] tokens, so its
    first query token has the absolute position context_len[s] - query_len[s]. Rows lie one
    behind the other (query_start ascends); padding rows have query_len 0, and tokens behind
    the last row are padding. One call may mix decode rows (one token) and prefill chunks.

    The pool is `kv_pages: [layers, pages, 2, kv_heads, page_size, head_dim]`, K at index 0 of
    the third axis and V at 1: a page of one layer is one contiguous piece of memory. Position p
    of row s is in page page_table[s, p // page_size]. Its values may be of another type than the
    queries, may be held as their bits (`values_dtype`), and may have scales (`kv_pages.KvPages`); K
    and V may lie side by side (`kv_pages.pool_parts`).

    Attributes:
        query_start: int32 [rows].
        query_len: int32 [rows].
        context_len: int32 [rows].
        page_table: int32 [rows, max_pages]; entries past the context are never used.
    """

    query_start: jax.Array
    query_len: jax.Array
    context_len: jax.Array
    page_table: jax.Array

    def rows_of_tokens(self, num_tokens: int) -> tuple[jax.Array, jax.Array]:
        """The row of every token, and whether the token is real.

        Returns:
            int32 [num_tokens] row indices (0 where padding) and bool [num_tokens].
        """
        token = jnp.arange(num_tokens, dtype=jnp.int32)
        inside = (token[:, None] >= self.query_start) & (
            token[:, None] < self.query_start + self.query_len
        )  # [tokens, rows]: small, and it needs no order
        return jnp.argmax(inside, axis=1).astype(jnp.int32), jnp.any(inside, axis=1)

    def positions(self, num_tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Absolute position of every token.

        Returns:
            positions int32 [num_tokens] (0 where padding), rows, and whether each is real.
        """
        row, valid = self.rows_of_tokens(num_tokens)
        first = self.context_len - self.query_len - self.query_start
        position = jnp.arange(num_tokens, dtype=jnp.int32) + first[row]
        return jnp.where(valid, position, 0), row, valid


def pool_format(sharding: Sharding, ndim: int = 6) -> Format:
    """Row-major memory for the pool, on all its way into and out of programs with kernels.

    Kernels address pages as contiguous memory. XLA:TPU chooses another order for head_dim 64,
    and would copy the pool to and fro around every kernel.

    Args:
        sharding: of the array.
        ndim: its axes: 6 of values, 5 of scales.
    """
    return Format(Layout(major_to_minor=tuple(range(ndim))), sharding)


# XLA:CPU computes nothing in bfloat16: around every update of a bfloat16 pool it would convert
# all of it to float32 and back, in memory of three times its size. Moving bits is no computing.
_BITS = {
    jnp.dtype(jnp.bfloat16): jnp.dtype(jnp.uint16),
    jnp.dtype(jnp.float8_e4m3fn): jnp.dtype(jnp.uint8),
}
_VALUES = {bits: values for values, bits in _BITS.items()}


def bits_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """What a pool of such values is made of where it is held as bits.

    Returns:
        uint16 for bfloat16, uint8 for float8_e4m3fn; other types as they are.
    """
    return _BITS.get(jnp.dtype(dtype), jnp.dtype(dtype))


def values_dtype(pool_dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The type of a pool's values, given that of its array: the inverse of `bits_dtype`."""
    return _VALUES.get(jnp.dtype(pool_dtype), jnp.dtype(pool_dtype))


def from_pool(x: jax.Array) -> jax.Array:
    """What was read from a pool, as values: any shape, in `values_dtype`."""
    dtype = values_dtype(x.dtype)
    return x if dtype == x.dtype else lax.bitcast_convert_type(x, dtype)


def to_pool(x: jax.Array, pool_dtype: jax.typing.DTypeLike) -> jax.Array:
    """Values of any type and shape, rounded and ready to be stored in a pool of `pool_dtype`."""
    x = x.astype(values_dtype(pool_dtype))
    return x if x.dtype == pool_dtype else lax.bitcast_convert_type(x, pool_dtype)
