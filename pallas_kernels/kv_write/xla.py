"""Writing K and V rows into their pages in plain XLA: one scatter."""

import jax
import jax.numpy as jnp

from pallas_kernels.paged_batch import PagedBatch, to_pool


def kv_write(
    kv_pages: jax.Array, k: jax.Array, v: jax.Array, batch: PagedBatch, *, layer: int | jax.Array
) -> jax.Array:
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
    new = to_pool(jnp.stack([k, v], axis=1), kv_pages.dtype)  # [tokens, 2, kv_heads, head_dim]
    return kv_pages.at[layer, page, :, :, position % page_size].set(new, mode="drop")
