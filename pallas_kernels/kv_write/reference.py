"""KV writes as their specification says it: one token after the other."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_pages import KvPool, stored
from pallas_kernels.paged_batch import PagedBatch


def kv_write(
    kv_pages: KvPool, k: jax.Array, v: jax.Array, batch: PagedBatch, *, layer: int | jax.Array
) -> KvPool:
    """`pallas_kernels.kv_write.kv_write` as its specification says it."""
    page_size = kv_pages.shape[4]
    position, row, valid = batch.positions(k.shape[0])

    def one_token(token: jax.Array, pool: KvPool) -> KvPool:
        page_index, slot = jnp.divmod(position[token], page_size)
        page = jnp.where(valid[token], batch.page_table[row[token], page_index], 0)
        at = (layer, page, slice(None), slice(None), slot)

        def put(array: jax.Array, new: jax.Array) -> jax.Array:
            return array.at[at].set(jnp.where(valid[token], new, array[at]))

        # [2, kv_heads, head_dim], and of scales [2, kv_heads]
        return jax.tree.map(put, pool, stored(jnp.stack([k[token], v[token]]), pool))

    return lax.fori_loop(0, k.shape[0], one_token, kv_pages)
