"""Writing K and V rows into their pages in plain XLA: one scatter of values, one of scales."""

import jax
import jax.numpy as jnp

from pallas_kernels.kv_pages import KvPool, stored
from pallas_kernels.paged_batch import PagedBatch


def kv_write(
    kv_pages: KvPool, k: jax.Array, v: jax.Array, batch: PagedBatch, *, layer: int | jax.Array
) -> KvPool:
    """`pallas_kernels.kv_write.kv_write` in plain XLA."""
    num_pages, page_size = kv_pages.shape[1], kv_pages.shape[4]
    position, row, valid = batch.positions(k.shape[0])
    page = batch.page_table[row, position // page_size]
    page = jnp.where(valid, page, num_pages)  # out of bounds: dropped
    if k.shape[0] == 1:
        # XLA:CPU turns a scatter of one row into an update of a copy of the whole pool; a
        # second, dropped row keeps it a scatter in place.
        k, v, position = (jnp.concatenate([x, x]) for x in (k, v, position))
        page = jnp.concatenate([page, jnp.full_like(page, num_pages)])
    slot = position % page_size

    def put(array: jax.Array, new: jax.Array) -> jax.Array:
        return array.at[layer, page, :, :, slot].set(new, mode="drop")

    # [tokens, 2, kv_heads, head_dim], and of scales [tokens, 2, kv_heads]
    return jax.tree.map(put, kv_pages, stored(jnp.stack([k, v], axis=1), kv_pages))
