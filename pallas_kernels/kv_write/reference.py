"""KV writes as their specification says it: one token after the other."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_batch import PagedBatch, to_pool


def kv_write(
    kv_pages: jax.Array, k: jax.Array, v: jax.Array, batch: PagedBatch, *, layer: int | jax.Array
) -> jax.Array:
    """`pallas_kernels.kv_write.kv_write` as its specification says it."""
    page_size = kv_pages.shape[4]
    position, row, valid = batch.positions(k.shape[0])

    def one_token(token: jax.Array, pool: jax.Array) -> jax.Array:
        page_index, slot = jnp.divmod(position[token], page_size)
        page = jnp.where(valid[token], batch.page_table[row[token], page_index], 0)
        new = to_pool(jnp.stack([k[token], v[token]]), pool.dtype)  # [2, kv_heads, head_dim]
        old = pool[layer, page, :, :, slot]
        return pool.at[layer, page, :, :, slot].set(jnp.where(valid[token], new, old))

    return lax.fori_loop(0, k.shape[0], one_token, kv_pages)
