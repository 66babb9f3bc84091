"""Paged attention in plain XLA: for CPUs, and for accelerators that no kernel is written for.

Two loops with run-time trip counts, so that cost follows real lengths and not padded ones:

* decode rows (one query token) in groups of DECODE_ROWS, over blocks of their contexts up to
  the longest of the group (callers that sort rows by context length lose least);
* prefill rows in tiles of up to PREFILL_TILE query tokens, over blocks of that row's context
  up to the tile's last token.

Both keep FlashAttention's running maximum and sum in float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_batch import PagedBatch

DECODE_ROWS = 8
DECODE_BLOCK = 128  # context tokens per turn of a decode loop
PREFILL_TILE = 64  # query tokens
PREFILL_BLOCK = 256
MASKED = -1e30  # finite: a row with nothing to see must not turn into NaN


class _Rules(NamedTuple):
    """What is fixed at trace time."""

    scale: float
    sliding_window: int | None
    soft_cap: float | None


def paged_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    batch: PagedBatch,
    *,
    layer: int | jax.Array,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """See `pallas_kernels.paged_attention.paged_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    kv_heads = kv_pages.shape[2]
    rules = _Rules(scale, sliding_window, soft_cap)
    queries = q.reshape(num_tokens, kv_heads, num_heads // kv_heads, head_dim)
    queries = jnp.moveaxis(queries, 0, 1)  # [kv_heads, tokens, group, head_dim]

    row, _ = batch.rows_of_tokens(num_tokens)
    is_decode = batch.query_len == 1
    decode_index = jnp.cumsum(is_decode) - 1  # of a row, among the decode rows
    decoded = _decode_rows(queries, kv_pages, layer, batch, is_decode, rules)
    out = jnp.take(decoded, decode_index[row], axis=1, mode="clip")
    if num_tokens > 1:
        prefilled = _prefill_rows(queries, kv_pages, layer, batch, ~is_decode, rules)
        out = jnp.where(is_decode[row][None, :, None, None], out, prefilled)
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _decode_rows(
    queries: jax.Array,
    kv_pages: jax.Array,
    layer: int | jax.Array,
    batch: PagedBatch,
    is_decode: jax.Array,
    rules: _Rules,
) -> jax.Array:
    """Attention of the rows with one token: [kv_heads, rows (decode rows first), group, D]."""
    num_rows, max_pages = batch.page_table.shape
    group_rows = min(DECODE_ROWS, num_rows)
    padded = -(-num_rows // group_rows) * group_rows
    block_pages = _pages_per_block(DECODE_BLOCK, kv_pages, max_pages)
    # The decode rows' indices, in order; padded with a row that does not exist.
    rows = jnp.nonzero(is_decode, size=padded, fill_value=num_rows)[0]

    def one_group(i: jax.Array, out: jax.Array) -> jax.Array:
        mine = lax.dynamic_slice_in_dim(rows, i * group_rows, group_rows)
        end = jnp.take(batch.context_len, mine, mode="fill", fill_value=0)
        start = _window_start(end - 1, rules)
        table = jnp.take(batch.page_table, mine, axis=0, mode="clip")
        q = jnp.take(queries, batch.query_start[mine], axis=1, mode="clip")  # [h, r, g, D]

        def scores(k: jax.Array) -> jax.Array:
            return jnp.einsum("hrgd,hrcd->hrgc", q, k, preferred_element_type=jnp.float32)

        def weigh(p: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.einsum("hrgc,hrcd->hrgd", p, v, preferred_element_type=jnp.float32)

        def used(context: jax.Array) -> jax.Array:
            return (context < end[:, None]) & (context >= start[:, None])

        def seen(context: jax.Array) -> jax.Array:
            return used(context)[None, :, None, :]  # [1, r, 1, c]

        attended = _over_blocks(
            q, kv_pages, layer, table, block_pages, jnp.min(start), jnp.max(end),
            scores, weigh, used, seen, rules,
        )  # fmt: skip
        return lax.dynamic_update_slice_in_dim(out, attended, i * group_rows, axis=1)

    kv_heads, _, group, head_dim = queries.shape
    out = jnp.zeros((kv_heads, padded, group, head_dim), queries.dtype)
    num_groups = (jnp.sum(is_decode) + group_rows - 1) // group_rows
    return lax.fori_loop(0, num_groups, one_group, out)


def _prefill_rows(
    queries: jax.Array,
    kv_pages: jax.Array,
    layer: int | jax.Array,
    batch: PagedBatch,
    is_prefill: jax.Array,
    rules: _Rules,
) -> jax.Array:
    """Attention of the rows with several tokens: [kv_heads, tokens, group, D]."""
    kv_heads, num_tokens, group, head_dim = queries.shape
    tile = min(PREFILL_TILE, num_tokens)
    block_pages = _pages_per_block(PREFILL_BLOCK, kv_pages, batch.page_table.shape[1])
    tiles = jnp.where(is_prefill, (batch.query_len + tile - 1) // tile, 0)
    tiles_before = jnp.cumsum(tiles) - tiles
    queries = jnp.pad(queries, ((0, 0), (0, tile), (0, 0), (0, 0)))  # the last tile may hang over

    def one_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.argmax((tiles_before <= i) & (i < tiles_before + tiles))
        offset = (i - tiles_before[row]) * tile
        token = batch.query_start[row] + offset
        first = batch.context_len[row] - batch.query_len[row] + offset
        position = first + jnp.arange(tile)
        end = jnp.minimum(first + tile, batch.context_len[row])
        q = lax.dynamic_slice_in_dim(queries, token, tile, axis=1)  # [h, t, g, D]

        def scores(k: jax.Array) -> jax.Array:  # k: [h, 1, c, D], one row
            return jnp.einsum("htgd,hcd->htgc", q, k[:, 0], preferred_element_type=jnp.float32)

        def weigh(p: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.einsum("htgc,hcd->htgd", p, v[:, 0], preferred_element_type=jnp.float32)

        def used(context: jax.Array) -> jax.Array:
            return ((context < end) & (context >= _window_start(first, rules)))[None]

        def seen(context: jax.Array) -> jax.Array:
            inside = (context <= position[:, None]) & used(context)
            inside &= context >= _window_start(position, rules)[:, None]
            return inside[None, :, None, :]  # [1, t, 1, c]

        attended = _over_blocks(
            q, kv_pages, layer, batch.page_table[row][None], block_pages,
            _window_start(first, rules), end, scores, weigh, used, seen, rules,
        )  # fmt: skip
        # A tile that hangs over its row is overwritten by the next row's, which comes later.
        return lax.dynamic_update_slice_in_dim(out, attended, token, axis=1)

    out = lax.fori_loop(0, jnp.sum(tiles), one_tile, jnp.zeros_like(queries))
    return out[:, :num_tokens]


def _over_blocks(
    q: jax.Array,
    kv_pages: jax.Array,
    layer: int | jax.Array,
    table: jax.Array,
    block_pages: int,
    start: jax.Array,
    end: jax.Array,
    scores: Callable[[jax.Array], jax.Array],
    weigh: Callable[[jax.Array, jax.Array], jax.Array],
    used: Callable[[jax.Array], jax.Array],
    seen: Callable[[jax.Array], jax.Array],
    rules: _Rules,
) -> jax.Array:
    """Online softmax of q [h, n, g, D] over positions start..end-1 of the table's rows.

    `scores` and `weigh` are the two matrix products with a block's K and V; of the block's
    positions, `used` [rows, c] hold valid KV, and `seen` [1, n, 1, c] count for each query.
    """
    page_size, head_dim = kv_pages.shape[4:]
    block = block_pages * page_size
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % block_pages)))

    def one_block(j: jax.Array, state: tuple) -> tuple:
        highest, total, acc = state
        pages = lax.dynamic_slice_in_dim(table, j * block_pages, block_pages, axis=1)
        context = j * block + jnp.arange(block)
        k, v = _gather(kv_pages, layer, pages, used(context))
        s = scores(k) * rules.scale
        if rules.soft_cap is not None:
            s = rules.soft_cap * jnp.tanh(s / rules.soft_cap)
        mask = seen(context)
        s = jnp.where(mask, s, MASKED)
        new_highest = jnp.maximum(highest, jnp.max(s, axis=-1))
        p = jnp.where(mask, jnp.exp(s - new_highest[..., None]), 0)
        fade = jnp.exp(highest - new_highest)
        total = total * fade + jnp.sum(p, axis=-1)
        acc = acc * fade[..., None] + weigh(p.astype(v.dtype), v)
        return new_highest, total, acc

    shape = q.shape[:-1]
    state = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
    _, total, acc = lax.fori_loop(start // block, (end + block - 1) // block, one_block, state)
    return (acc / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype)


def _gather(
    kv_pages: jax.Array, layer: int | jax.Array, pages: jax.Array, used: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """K and V of pages [n, block_pages]: each [kv_heads, n, block, D], V zero where not used."""
    layers, _, kv_heads, num_pages, page_size, head_dim = kv_pages.shape
    # One flat row per (layer, K or V, head, page): a gather of long rows is a plain copy.
    flat = kv_pages.reshape(layers * 2 * kv_heads * num_pages, page_size * head_dim)
    head = jnp.arange(kv_heads, dtype=jnp.int32)[:, None, None] * num_pages
    page = jnp.clip(pages, 0, num_pages - 1)[None]

    def rows(which: int) -> jax.Array:
        index = (layer * 2 + which) * kv_heads * num_pages + head + page
        got = flat.at[index].get(mode="promise_in_bounds")
        return got.reshape(kv_heads, pages.shape[0], -1, head_dim)

    # Unwritten slots may hold anything, NaN included, and 0 * NaN is NaN.
    return rows(0), jnp.where(used[None, :, :, None], rows(1), 0)


def _window_start(position: jax.Array, rules: _Rules) -> jax.Array:
    """First position that a token at `position` sees."""
    if rules.sliding_window is None:
        return jnp.zeros_like(position)
    return jnp.maximum(position - rules.sliding_window + 1, 0)


def _pages_per_block(block: int, kv_pages: jax.Array, max_pages: int) -> int:
    return min(max(block // kv_pages.shape[4], 1), max_pages)
