"""Writing a step's new K and V rows into their pages."""

import jax
import jax.numpy as jnp

from pallas_kernels.paged_batch import PagedBatch


def kv_write(
    kv_pages: jax.Array, k: jax.Array, v: jax.Array, batch: PagedBatch, *, layer: int | jax.Array
) -> jax.Array:
    """Store one layer's new keys and values; in place when `kv_pages` is donated.

    Args:
        kv_pages: [layers, 2, kv_heads, pages, page_size, head_dim].
        k: [tokens, kv_heads, head_dim].
        v: [tokens, kv_heads, head_dim].
        batch: which token goes to which position of which page table row.
        layer: index on the pool's first axis.

    Returns:
        `kv_pages` with the rows of real tokens replaced; padding tokens write nothing.
    """
    num_pages, page_size = kv_pages.shape[3:5]
    position, row, valid = batch.positions(k.shape[0])
    page = batch.page_table[row, position // page_size]
    page = jnp.where(valid, page, num_pages)  # out of bounds: dropped
    new = jnp.stack([k, v]).swapaxes(1, 2).astype(kv_pages.dtype)  # [2, kv_heads, tokens, D]
    # Indices on axes 3 and 4 only: one window per token holds its K and V of all heads.
    return kv_pages.at[layer, :, :, page, position % page_size].set(
        jnp.moveaxis(new, 2, 0), mode="drop"
    )
