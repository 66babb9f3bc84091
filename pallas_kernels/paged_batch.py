"""The ragged batch that every kernel here takes: whose tokens they are, and where KV lives."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
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
    of row s is in page page_table[s, p // page_size].

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


def pool_format(sharding: Sharding) -> Format:
    """Row-major memory for the pool, on all its way into and out of programs with kernels.

    Kernels address pages as contiguous memory. XLA:TPU chooses another order for head_dim 64,
    and would copy the pool to and fro around every kernel.
    """
    return Format(Layout(major_to_minor=(0, 1, 2, 3, 4, 5)), sharding)
