"""Paged attention as its specification says it: slow, dense, and easy to believe."""

import jax
import jax.numpy as jnp

from pallas_kernels.kv_pages import KvPool, is_joined, loaded, scales_of, separate, values_of
from pallas_kernels.paged_batch import PagedBatch


def paged_attention(
    q: jax.Array,
    kv_pages: KvPool,
    batch: PagedBatch,
    *,
    layer: int | jax.Array,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal attention of every token over its row's whole context. See the package's docs."""
    num_tokens, num_heads, head_dim = q.shape
    num_pages, _, kv_heads, page_size = kv_pages.shape[1:5]
    position, row, valid = batch.positions(num_tokens)

    table = jnp.clip(batch.page_table, 0, num_pages - 1)
    scales = scales_of(kv_pages)
    # [rows, max_pages, 2, kv_heads, page_size, head_dim]
    pages = values_of(kv_pages)[layer][table]
    pages = separate(pages) if is_joined(kv_pages) else pages
    dense = loaded(pages, None if scales is None else scales[layer][table])
    dense = jnp.moveaxis(dense, (2, 3), (0, 1))
    dense = dense.reshape(2, kv_heads, table.shape[0], table.shape[1] * page_size, head_dim)
    dense = dense.astype(q.dtype)[:, :, row]  # [2, kv_heads, tokens, context, head_dim]

    context = jnp.arange(dense.shape[3])
    seen = (context <= position[:, None]) & valid[:, None]
    if sliding_window is not None:
        seen &= context > position[:, None] - sliding_window
    k, v = jnp.where(seen[None, None, :, :, None], dense, 0)

    queries = q.reshape(num_tokens, kv_heads, num_heads // kv_heads, head_dim)
    scores = jnp.einsum("thgd,htcd->thgc", queries, k) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    weights = jax.nn.softmax(scores, axis=-1, where=seen[:, None, None, :])
    out = jnp.einsum("thgc,htcd->thgd", weights, v)
    out = jnp.where(valid[:, None, None], out.reshape(q.shape), 0)
    if not return_lse:
        return out
    scores = scores.astype(jnp.float32)
    lse = jax.nn.logsumexp(scores, axis=-1, where=seen[:, None, None, :])
    return out, lse.reshape(q.shape[:2])
