"""Paged attention in plain XLA: for CPUs, and for accelerators that no kernel is written for.

Two loops with run-time trip counts, so that cost follows real lengths and not padded ones:

* decode rows (one query token) in groups, over the pages of their contexts up to the longest
  of the group (callers that sort rows by context length lose least);
* prefill rows in tiles of up to PREFILL_TILE query tokens, over blocks of that row's context
  up to the tile's last token.

Both keep FlashAttention's running maximum and sum in float32. K and V are converted as they are
gathered, to the queries' type or, if that is the wider one, the queries to the pool's; quantised
ones always to the queries'.

What decides the speed on CPU is the gather of pages, from memory that no cache holds: whole
pages are copied, all KV heads together, and decode rows take one page a turn, so that what was
gathered is multiplied as it lies.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_pages import KvPool, head_dim_of, loaded, scales_of, values_of
from pallas_kernels.paged_batch import PagedBatch, values_dtype

DECODE_TOKENS = 1024  # context tokens per turn of a decode loop: rows times one page
PREFILL_TILE = 64  # query tokens
PREFILL_BLOCK = 128  # context tokens per turn of a prefill loop
MASKED = -1e30  # finite: a row with nothing to see must not turn into NaN


class _Rules(NamedTuple):
    """What is fixed at trace time."""

    scale: float
    sliding_window: int | None
    soft_cap: float | None
    return_lse: bool


class _Products(NamedTuple):
    """What one loop computes with a block of K and V [rows, kv_heads, block, head_dim].

    Attributes:
        scores: K -> float32 [..., block], one score per query and position.
        weigh: (weights [..., block], V) -> float32 [..., head_dim].
        used: positions [block] -> bool [rows, block], whether they hold valid KV of the row.
        seen: positions [block] -> bool, broadcast to scores: whether the query attends there.
    """

    scores: Callable[[jax.Array], jax.Array]
    weigh: Callable[[jax.Array, jax.Array], jax.Array]
    used: Callable[[jax.Array], jax.Array]
    seen: Callable[[jax.Array], jax.Array]


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
    """`pallas_kernels.paged_attention.paged_attention` in plain XLA."""
    num_tokens, num_heads, head_dim = q.shape
    kv_heads = kv_pages.shape[3]
    rules = _Rules(scale, sliding_window, soft_cap, return_lse)
    queries = q.reshape(num_tokens, kv_heads, num_heads // kv_heads, head_dim)

    row, _ = batch.rows_of_tokens(num_tokens)
    is_decode = batch.query_len == 1
    decode_index = jnp.cumsum(is_decode) - 1  # of a row, among the decode rows
    decoded = _decode_rows(queries, kv_pages, layer, batch, is_decode, rules)
    outs = jax.tree.map(lambda x: jnp.take(x, decode_index[row], axis=0, mode="clip"), decoded)
    if num_tokens > 1:
        prefilled = _prefill_rows(queries, kv_pages, layer, batch, ~is_decode, rules)
        outs = jax.tree.map(
            lambda x, y: jnp.where(is_decode[row][:, None, None, None], x, y), outs, prefilled
        )
    out = outs[0].reshape(q.shape)
    return (out, outs[1].reshape(q.shape[:2])) if return_lse else out


def _empty_outs(queries: jax.Array, rules: _Rules) -> tuple[jax.Array, ...]:
    """What loops write their results into: [..., head_dim] and, if asked for, the LSE [..., 1]."""
    lse = (jnp.zeros((*queries.shape[:-1], 1), jnp.float32),) if rules.return_lse else ()
    return jnp.zeros_like(queries), *lse


def _update(
    outs: tuple[jax.Array, ...], new: tuple[jax.Array, ...], start: jax.Array, axis: int
) -> tuple[jax.Array, ...]:
    """Write `new` into `outs` from `start` on."""
    return jax.tree.map(
        lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, axis=axis), outs, new
    )


def _decode_rows(
    queries: jax.Array,
    kv_pages: KvPool,
    layer: int | jax.Array,
    batch: PagedBatch,
    is_decode: jax.Array,
    rules: _Rules,
) -> tuple[jax.Array, ...]:
    """Attention of the rows with one token: [rows (decode rows first), kv_heads, group, D]."""
    num_rows = batch.page_table.shape[0]
    page_size = kv_pages.shape[4]
    # At least two groups: XLA:CPU runs one that it sees alone, without its loop, a third slower.
    group_rows = max(min(DECODE_TOKENS // page_size, num_rows // 2), 1)
    padded = -(-num_rows // group_rows) * group_rows
    # The decode rows' numbers, in order; padded with a row that does not exist.
    rows = jnp.nonzero(is_decode, size=padded, fill_value=num_rows)[0]
    ends = jnp.take(batch.context_len, rows, mode="fill", fill_value=0)
    # Fillers start nowhere, or their group would read its sliding windows from position 0.
    starts = jnp.where(rows < num_rows, _window_start(ends - 1, rules), jnp.iinfo(jnp.int32).max)
    table = jnp.take(batch.page_table, rows, axis=0, mode="clip")
    tokens = jnp.take(batch.query_start, rows, mode="clip")
    queries = jnp.take(queries, tokens, axis=0, mode="clip")  # [rows, h, g, D]

    def one_group(i: jax.Array, outs: tuple) -> tuple:
        def mine(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, i * group_rows, group_rows)

        start, end, q = mine(starts), mine(ends), mine(queries)

        def used(position: jax.Array) -> jax.Array:
            return (position < end[:, None]) & (position >= start[:, None])

        products = _Products(
            scores=lambda k: jnp.einsum("rhgd,rhcd->rhgc", q, k, preferred_element_type="float32"),
            weigh=lambda p, v: jnp.einsum(
                "rhgc,rhcd->rhgd", p, v, preferred_element_type="float32"
            ),
            used=used,
            seen=lambda position: used(position)[:, None, None, :],
        )
        ends_of_group = jnp.min(start), jnp.max(end)
        attended = _over_blocks(q, kv_pages, layer, mine(table), 1, ends_of_group, products, rules)
        return _update(outs, attended, i * group_rows, axis=0)

    num_groups = (jnp.sum(is_decode) + group_rows - 1) // group_rows
    return lax.fori_loop(0, num_groups, one_group, _empty_outs(queries, rules))


def _prefill_rows(
    queries: jax.Array,
    kv_pages: KvPool,
    layer: int | jax.Array,
    batch: PagedBatch,
    is_prefill: jax.Array,
    rules: _Rules,
) -> tuple[jax.Array, ...]:
    """Attention of the rows with several tokens: [tokens, kv_heads, group, D]."""
    num_tokens = queries.shape[0]
    tile = min(PREFILL_TILE, num_tokens)
    tiles = jnp.where(is_prefill, (batch.query_len + tile - 1) // tile, 0)
    tiles_before = jnp.cumsum(tiles) - tiles
    block_pages = min(max(PREFILL_BLOCK // kv_pages.shape[4], 1), batch.page_table.shape[1])
    # The last tile may hang over.
    queries = jnp.pad(jnp.moveaxis(queries, 0, 1), ((0, 0), (0, tile), (0, 0), (0, 0)))

    def one_tile(i: jax.Array, outs: tuple) -> tuple:
        row = jnp.argmax((tiles_before <= i) & (i < tiles_before + tiles))
        offset = (i - tiles_before[row]) * tile
        token = batch.query_start[row] + offset
        first = batch.context_len[row] - batch.query_len[row] + offset
        start, end = _window_start(first, rules), jnp.minimum(first + tile, batch.context_len[row])
        own = first + jnp.arange(tile)
        q = lax.dynamic_slice_in_dim(queries, token, tile, axis=1)  # [h, t, g, D]

        def used(position: jax.Array) -> jax.Array:
            return ((position < end) & (position >= start))[None]

        def seen(position: jax.Array) -> jax.Array:
            inside = (position <= own[:, None]) & used(position)
            inside &= position >= _window_start(own, rules)[:, None]
            return inside[None, :, None, :]  # [1, t, 1, c]

        products = _Products(
            scores=lambda k: jnp.einsum(
                "htgd,hcd->htgc", q, k[0], preferred_element_type="float32"
            ),
            weigh=lambda p, v: jnp.einsum(
                "htgc,hcd->htgd", p, v[0], preferred_element_type="float32"
            ),
            used=used,
            seen=seen,
        )
        table = batch.page_table[row][None]
        attended = _over_blocks(
            q, kv_pages, layer, table, block_pages, (start, end), products, rules
        )
        # A tile that hangs over its row is overwritten by the next row's, which comes later.
        return _update(outs, attended, token, axis=1)

    outs = lax.fori_loop(0, jnp.sum(tiles), one_tile, _empty_outs(queries, rules))
    return jax.tree.map(lambda x: jnp.moveaxis(x[:, :num_tokens], 1, 0), outs)


def _over_blocks(
    q: jax.Array,
    kv_pages: KvPool,
    layer: int | jax.Array,
    table: jax.Array,
    block_pages: int,
    span: tuple[jax.Array, jax.Array],
    products: _Products,
    rules: _Rules,
) -> tuple[jax.Array, ...]:
    """Online softmax of q [..., D] over positions start..end-1 of the rows of `table`."""
    num_pages, parts, kv_heads, page_size, width = kv_pages.shape[1:]
    head_dim = head_dim_of(kv_pages)
    num_rows, max_pages = table.shape
    block = block_pages * page_size
    # K and V of a page: two rows, or the two halves of one.
    pages = values_of(kv_pages).reshape(-1, kv_heads * page_size * width)
    scales = scales_of(kv_pages)
    if scales is not None:
        scales = scales.reshape(-1, kv_heads * page_size)
    table = jnp.pad(jnp.clip(table, 0, num_pages - 1), ((0, 0), (0, -max_pages % block_pages)))
    table = table + layer * num_pages
    computed = q.dtype
    if scales is None:
        computed = jnp.promote_types(q.dtype, values_dtype(kv_pages.dtype))

    def one_block(j: jax.Array, state: tuple) -> tuple:
        highest, total, acc = state
        mine = lax.dynamic_slice_in_dim(table, j * block_pages, block_pages, axis=1)
        position = j * block + jnp.arange(block)

        def gather(which: int) -> jax.Array:  # K 0, V 1
            def taken(array: jax.Array, parts: int, *rest: int) -> jax.Array:
                index = mine * parts + min(which, parts - 1)
                got = array.at[index].get(mode="promise_in_bounds")
                return got.reshape(num_rows, block_pages, kv_heads, page_size, *rest)

            values = taken(pages, parts, width)
            if parts == 1:
                values = values[..., which * head_dim : (which + 1) * head_dim]
            own_scales = None if scales is None else taken(scales, 2)
            got = loaded(values, own_scales).astype(computed)
            return got.swapaxes(1, 2).reshape(num_rows, kv_heads, block, head_dim)

        s = products.scores(gather(0)) * rules.scale
        if rules.soft_cap is not None:
            s = rules.soft_cap * jnp.tanh(s / rules.soft_cap)
        # Where a row sees nothing of its first blocks its weights are meaningless until the
        # first real score, which fades them to exactly zero.
        s = jnp.where(products.seen(position), s, MASKED)
        new_highest = jnp.maximum(highest, jnp.max(s, axis=-1))
        p = jnp.exp(s - new_highest[..., None])
        fade = jnp.exp(highest - new_highest)
        total = total * fade + jnp.sum(p, axis=-1)
        # Unwritten slots may hold anything, NaN included, and 0 * NaN is NaN.
        v = jnp.where(products.used(position)[:, None, :, None], gather(1), 0)
        acc = acc * fade[..., None] + products.weigh(p.astype(v.dtype), v)
        return new_highest, total, acc

    empty = q.shape[:-1]
    state = (jnp.full(empty, MASKED), jnp.zeros(empty), jnp.zeros((*empty, head_dim)))
    first, last = span[0] // block, (span[1] + block - 1) // block
    highest, total, acc = lax.fori_loop(first, last, one_block, state)
    out = (acc / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype)
    if not rules.return_lse:
        return (out,)
    lse = jnp.where(highest > MASKED, highest + jnp.log(total), -jnp.inf)
    return out, lse[..., None]


def _window_start(position: jax.Array, rules: _Rules) -> jax.Array:
    """First position that a token at `position` sees."""
    if rules.sliding_window is None:
        return jnp.zeros_like(position)
    return jnp.maximum(position - rules.sliding_window + 1, 0)
