"""Ragged paged attention on Hopper GPUs (H100, H200) in Mosaic GPU: WGMMA and TMA.

Two kernels and a merge, each bounded by what the batch really holds: `gpu_decode` takes the rows
of one query token, `gpu_prefill` the others, and both write one output. A step without rows of
one kind costs that kernel's launch.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.jax_compat import gpu_core_count, gpu_kind
from pallas_kernels.kv_pages import KvPool, is_quantised, values_of
from pallas_kernels.paged_attention.gpu_decode import columns, decode, plan_decode
from pallas_kernels.paged_attention.gpu_prefill import (
    ROWS,
    lse_of_tokens,
    plan_prefill,
    prefill,
)
from pallas_kernels.paged_attention.gpu_tiles import Attention, GpuTiles, lookup_tiles
from pallas_kernels.paged_attention.tuning import Shape
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
    tiles: GpuTiles | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal attention of ragged queries over paged keys and values. See the package's docs.

    Args:
        q: bfloat16 or float16 [tokens, heads, head_dim].
        kv_pages: q's dtype [layers, pages, 2, kv_heads, page_size, head_dim].
        batch: the ragged batch.
        layer: index on the pool's first axis; may be traced.
        scale: what scores are multiplied by.
        sliding_window: positions a token sees, itself included; None sees all.
        soft_cap: if given, scores become soft_cap * tanh(scores / soft_cap).
        return_lse: also return the log of the sum of exp of scores.
        tiles: block sizes; None takes those of `lookup_tiles`.

    Returns:
        [tokens, heads, head_dim] in q's dtype, undefined where padding; with `return_lse` also
        float32 [tokens, heads], -inf where padding.

    Raises:
        ValueError: a shape or dtype that the kernels do not take.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_pages, _, kv_heads, page_size = kv_pages.shape[1:5]
    if tiles is None:
        shape = Shape(num_heads, kv_heads, head_dim, page_size, kv_pages.dtype)
        tiles = lookup_tiles(gpu_kind(), gpu_core_count(), shape)
    _check(q, kv_pages, tiles)
    heads = q.reshape(num_tokens, kv_heads, num_heads // kv_heads, head_dim)
    real, group = heads.shape[2], _group(heads.shape[2])
    if group > real:
        heads = jnp.pad(heads, ((0, 0), (0, 0), (0, group - real), (0, 0)))
    attention = Attention(
        num_pages, kv_heads, group, page_size, head_dim, scale, sliding_window, soft_cap
    )
    pool = values_of(kv_pages).reshape(-1, page_size, head_dim)

    at = jnp.asarray(layer, jnp.int32).reshape(1)
    decode_plan = plan_decode(batch, attention, tiles)
    out, lse = decode(heads, pool, batch.page_table, at, decode_plan, attention, tiles)
    lse = lse[:, :, :real]
    if num_tokens > 1:
        plan = plan_prefill(batch, num_tokens, attention, tiles)
        out, tile_lse = prefill(heads, pool, batch.page_table, at, out, plan, attention, tiles)
        if return_lse:
            row, _ = batch.rows_of_tokens(num_tokens)
            chunk_lse = lse_of_tokens(tile_lse, plan, batch, num_tokens, group)[:, :, :real]
            lse = jnp.where((batch.query_len[row] > 1)[:, None, None], chunk_lse, lse)
    out = out[:, :, :real].reshape(q.shape)
    if not return_lse:
        return out
    _, valid = batch.rows_of_tokens(num_tokens)
    lse = lse.reshape(num_tokens, num_heads) * math.log(2)
    return out, jnp.where(valid[:, None], lse, -jnp.inf)


def _group(group: int) -> int:
    """Query heads of a KV head as the kernels count them: TMA pads up to 8 by itself."""
    return group if group <= 8 else columns(group)


def refusal(shape: Shape, tiles: GpuTiles | None = None) -> str | None:
    """Why the kernels do not take a shape, or None if they do.

    Args:
        shape: of queries and pool.
        tiles: block sizes; None takes those of `lookup_tiles`.
    """
    if is_quantised(shape.dtype):
        return f"it reads no quantised KV pages such as {jnp.dtype(shape.dtype).name}"
    if jnp.dtype(shape.dtype) not in (jnp.bfloat16, jnp.float16):
        name = jnp.dtype(shape.dtype).name
        return f"it takes bfloat16 or float16, not {name}: tensor cores round float32 to 10 bits"
    if shape.query_dtype is not None and jnp.dtype(shape.query_dtype) != jnp.dtype(shape.dtype):
        return (
            f"it takes queries and KV pages of one dtype, not {jnp.dtype(shape.query_dtype).name} "
            f"and {jnp.dtype(shape.dtype).name}; give both {jnp.dtype(shape.dtype).name}, or use "
            "'xla', which takes both"
        )
    if shape.head_dim not in (64, 128, 256):
        return f"it takes head_dim 64, 128 or 256, not {shape.head_dim}"
    if shape.heads % shape.kv_heads or _group(shape.heads // shape.kv_heads) > ROWS:
        return (
            f"it takes 1 to {ROWS} query heads for each KV head, not {shape.heads} for "
            f"{shape.kv_heads}"
        )
    tiles = tiles or lookup_tiles(gpu_kind(), gpu_core_count(), shape)
    for tile in (tiles.decode_tile, tiles.prefill_tile):
        if shape.page_size % 8 or (tile % shape.page_size and shape.page_size % tile):
            return (
                f"it takes pages of a multiple of 8 slots that divide {tile} or are divided by "
                f"it, not {shape.page_size}"
            )
    return None


def _check(q: jax.Array, kv_pages: KvPool, tiles: GpuTiles) -> None:
    """Refuses what the kernels cannot do, with what to do instead."""
    kv_heads, page_size = kv_pages.shape[3:5]
    shape = Shape(q.shape[1], kv_heads, q.shape[2], page_size, kv_pages.dtype, q.dtype)
    reason = refusal(shape, tiles)
    if reason is not None:
        raise ValueError(f'paged attention on GPU: {reason}; use implementation="xla"')
