"""Prefill chunks on Hopper: rows of several query tokens, bound by the tensor cores.

A tile of query rows is tokens times the heads of one group, so that heads that read the same K
and V share them; its tokens are of one row. Persistent thread blocks take (tile, KV head) items
in turn, as many as there really are. In a block one warpgroup fetches K and V page by page,
running ahead over items too, and the others each hold 64 query rows and FlashAttention-2's
running maximum, sum and output. A query tile comes in and goes out token by token, since
the tokens of a group's heads lie apart and a tile's end must not write over the next row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.jax_compat import load_ref, mosaic_gpu_kernel, transpose_ref
from pallas_kernels.paged_attention.gpu_tiles import (
    OPERAND,
    Attention,
    GpuTiles,
    along,
    filled,
    product,
    zero_rows_from,
)
from pallas_kernels.paged_batch import PagedBatch

ROW, TOKEN, VALID, POSITION, CONTEXT = range(5)  # columns of PrefillPlan.tiles
ROWS = 64  # query rows of a warpgroup: what one WGMMA instruction takes


class PrefillPlan(NamedTuple):
    """The tiles of query tokens.

    Attributes:
        header: int32 [1]: how many tiles there are.
        tiles: int32 [max_tiles, 5]: row of the batch, first token, tokens, the first one's
            position, the row's context.
        first: int32 [rows]: the first tile of every row.
    """

    header: jax.Array
    tiles: jax.Array
    first: jax.Array


def tokens_per_warpgroup(group: int) -> int:
    """Tokens whose heads of one group fill a warpgroup's query rows."""
    return ROWS // group


def plan_prefill(
    batch: PagedBatch,
    num_tokens: int,
    attention: Attention,
    tiles: GpuTiles,
) -> PrefillPlan:
    """Cuts rows of more than one query token into tiles. XLA computes it once for all layers."""
    num_rows = batch.query_len.shape[0]
    size = tiles.prefill_warpgroups * tokens_per_warpgroup(attention.group)
    most = max(1, num_tokens // size + min(num_rows, num_tokens // 2))
    count = jnp.where(batch.query_len > 1, -(-batch.query_len // size), 0)
    after = jnp.cumsum(count).astype(jnp.int32)
    tile = jnp.arange(most, dtype=jnp.int32)
    row = jnp.searchsorted(after, tile, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, num_rows - 1)
    offset = (tile - (after - count)[row]) * size
    length, context = batch.query_len[row], batch.context_len[row]
    fields = (
        row,
        batch.query_start[row] + offset,
        jnp.clip(length - offset, 0, size),
        context - length + offset,
        context,
    )
    return PrefillPlan(
        after[-1:],
        jnp.stack(fields, axis=1).astype(jnp.int32),
        (after - count).astype(jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("attention", "tiles"))
def prefill(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    layer: jax.Array,
    out: jax.Array,
    plan: PrefillPlan,
    attention: Attention,
    tiles: GpuTiles,
) -> tuple[jax.Array, jax.Array]:
    """Attention of the tokens of rows that have more than one, written over `out`.

    Args:
        q: [tokens, kv_heads, group, head_dim].
        pool: [layers * pages * 2 * kv_heads, page_size, head_dim].
        page_table: int32 [rows, max_pages].
        layer: int32 [1]: an operand, so that all layers share one kernel, lowered once.
        out: like q; its memory is reused, other tokens' places keep what they hold.
        plan: from `plan_prefill`.
        attention: the call's constants.
        tiles: block sizes.

    Returns:
        out, and the log2 of the sum of exp2 of scores, float32 [max_tiles, kv_heads,
        warpgroups, 64]: see `lse_of_tokens`.
    """
    kv_heads, head_dim, stages = q.shape[1], q.shape[3], tiles.prefill_stages
    workers, tile = tiles.prefill_warpgroups, tiles.prefill_tile
    copies = max(1, tile // attention.page_size)
    max_tiles = plan.tiles.shape[0]
    kv = plgpu.SMEM((stages, tile, head_dim), q.dtype, transforms=OPERAND)
    ready = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=workers, num_barriers=stages)
    out_ref = jax.new_ref(out)
    (lse,) = mosaic_gpu_kernel(
        lambda *refs: _prefill_body(attention, tiles, *refs),
        out_type=(jax.ShapeDtypeStruct((max_tiles, kv_heads, workers, ROWS), jnp.float32),),
        scratch_types=(
            plgpu.SMEM((workers, ROWS, head_dim), q.dtype),
            plgpu.SMEM((workers, ROWS, head_dim), q.dtype, transforms=OPERAND),
            plgpu.SMEM((workers, ROWS, tile), q.dtype, transforms=OPERAND),
            kv,
            kv,
            plgpu.Barrier(num_arrivals=tokens_per_warpgroup(attention.group), num_barriers=workers),
            (ready, ready),
            (free, free),
            plgpu.Barrier(num_barriers=stages),
        ),
        grid=min(tiles.prefill_blocks, max_tiles * kv_heads),
        num_threads=workers + 1,
        name="paged_prefill",
    )(layer, plan.header, plan.tiles, page_table, q, pool, out_ref)
    return jax.freeze(out_ref), lse


class _Pipe(NamedTuple):
    """K and V tiles on their way from the fetching warpgroup to the others, in slots.

    Attributes:
        smem: of K and of V, [stages, tile, head_dim].
        ready: of K and of V: a tile has arrived.
        free: of K and of V: every other warpgroup has done with it.
        clean: the first one has zeroed the rows of V that no token was written to.
    """

    smem: tuple[Any, Any]
    ready: tuple[Any, Any]
    free: tuple[Any, Any]
    clean: Any


class _Item(NamedTuple):
    """A tile of query tokens and a KV head, and the K and V tiles that it sees."""

    line: jax.Array
    head: jax.Array
    start: jax.Array
    steps: jax.Array

    @classmethod
    def at(
        cls, index: jax.Array, header_ref: Any, tiles_ref: Any, attention: Attention, tile: int
    ) -> "_Item":
        heads = jnp.int32(attention.kv_heads)
        # A row's last tiles see most: taken first, so that short ones fill the gaps at the end.
        line = header_ref[0] - 1 - lax.div(index, heads)
        position = tiles_ref[line, POSITION]
        window = attention.sliding_window
        seen = position * 0 if window is None else jnp.maximum(position - (window - 1), 0)
        start = attention.first_tile_position(seen, tile)
        length = position + tiles_ref[line, VALID] - start
        return cls(
            line, lax.rem(index, heads), start, lax.div(length + (tile - 1), jnp.int32(tile))
        )


def _prefill_body(
    attention: Attention, tiles: GpuTiles,
    layer_ref: Any, header_ref: Any, tiles_ref: Any, table_ref: Any, q_ref: Any, pool_ref: Any,
    out_ref: Any, lse_ref: Any, token_smem: Any, q_smem: Any, p_smem: Any, k_smem: Any, v_smem: Any,
    q_ready: Any, kv_ready: Any, kv_free: Any, v_clean: Any,
) -> None:  # fmt: skip
    """One thread block: its items, by one warpgroup that fetches and others that multiply."""
    workers, tile = tiles.prefill_warpgroups, tiles.prefill_tile
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    items = header_ref[0] * attention.kv_heads
    blocks = min(tiles.prefill_blocks, tiles_ref.shape[0] * attention.kv_heads)
    turns = lax.div(items - block + (blocks - 1), jnp.int32(blocks))

    pipe = _Pipe((k_smem, v_smem), kv_ready, kv_free, v_clean)

    def item_of(turn: jax.Array) -> _Item:
        return _Item.at(block + turn * blocks, header_ref, tiles_ref, attention, tile)

    @pl.when(warpgroup == workers)
    def _() -> None:
        if workers > 1:
            plgpu.set_max_registers(40, action="decrease")
        _fetch_items(
            attention, tiles, turns, item_of, layer_ref, tiles_ref, table_ref, pool_ref, pipe
        )

    @pl.when(warpgroup < workers)
    def _() -> None:
        if workers > 1:
            plgpu.set_max_registers(232, action="increase")
        mine = tuple(ref.at[warpgroup] for ref in (token_smem, q_smem, p_smem))

        def take(turn: jax.Array, done: jax.Array) -> jax.Array:
            item = item_of(turn)
            skipped = warpgroup * tokens_per_warpgroup(attention.group)
            _load_queries(attention, item, skipped, tiles_ref, q_ref, mine, q_ready.at[warpgroup])
            columns, lse = _attend(attention, item, skipped, done, tiles_ref, mine, pipe)
            lse_ref[item.line, item.head, warpgroup] = lse
            _store_tokens(attention, item, skipped, tiles_ref, columns, mine[0], out_ref)
            return done + item.steps

        lax.fori_loop(0, turns, take, jnp.int32(0))


def _fetch_items(
    attention: Attention, tiles: GpuTiles, turns: jax.Array, item_of: Any, layer_ref: Any,
    tiles_ref: Any, table_ref: Any, pool_ref: Any, pipe: _Pipe,
) -> None:  # fmt: skip
    """The fetching warpgroup: every K and V tile of every item, as soon as there is room."""
    tile, stages = tiles.prefill_tile, jnp.int32(tiles.prefill_stages)

    def fetch(turn: jax.Array, done: jax.Array) -> jax.Array:
        item = item_of(turn)
        row = tiles_ref[item.line, ROW]
        last = lax.div(tiles_ref[item.line, CONTEXT] - 1, jnp.int32(attention.page_size))

        def step(i: jax.Array, _: None) -> None:
            position = item.start + i * tile
            slot = lax.rem(done + i, stages)
            pages = attention.pages_of_tile(position, table_ref, row, last, tile)
            for kind in range(2):

                @pl.when(done + i >= stages)
                def _(kind: int = kind) -> None:
                    plgpu.barrier_wait(pipe.free[kind].at[slot])

                attention.copy_tile(
                    pool_ref, pages, kind, item.head, position, layer_ref[0],
                    pipe.smem[kind].at[slot], pipe.ready[kind].at[slot],
                )  # fmt: skip

        lax.fori_loop(0, item.steps, step, None)
        return done + item.steps

    done = lax.fori_loop(0, turns, fetch, jnp.int32(0))

    def drain(i: jax.Array, _: None) -> None:
        for kind in range(2):
            plgpu.barrier_wait(pipe.free[kind].at[lax.rem(i, stages)])

    lax.fori_loop(jnp.maximum(done - stages, 0), done, drain, None)


def _load_queries(
    attention: Attention, item: _Item, skipped: jax.Array, tiles_ref: Any, q_ref: Any, mine: tuple,
    ready: Any,
) -> None:  # fmt: skip
    """Brings a warpgroup's query rows into shared memory, as an operand of a product.

    Tokens behind the tile's last are of other rows or repeat the last of all; their results
    are computed and dropped.
    """
    token_smem, q_smem, _ = mine
    group = attention.group
    token = tiles_ref[item.line, TOKEN] + skipped

    def copy(i: jax.Array, _: None) -> None:
        source = jnp.minimum(token + i, q_ref.shape[0] - 1)
        plgpu.copy_gmem_to_smem(
            q_ref.at[source, item.head], token_smem.at[pl.ds(i * group, group)], ready
        )

    lax.fori_loop(0, tokens_per_warpgroup(group), copy, None)
    plgpu.barrier_wait(ready)
    q_smem[...] = load_ref(token_smem, plgpu.Layout.WGMMA, optimized=False)
    plgpu.commit_smem()


def _attend(
    attention: Attention, item: _Item, skipped: jax.Array, done: jax.Array, tiles_ref: Any,
    mine: tuple, pipe: _Pipe,
) -> tuple[tuple[jax.Array, ...], jax.Array]:  # fmt: skip
    """A warpgroup's 64 query rows against all K and V tiles of an item.

    Returns:
        The output in chunks of columns, float32 [64, columns], and its log2 sum [64].
    """
    _, q_smem, p_smem = mine
    stages, tile, head_dim = pipe.smem[0].shape
    group, window = attention.group, attention.sliding_window
    position = tiles_ref[item.line, POSITION] + skipped
    context = tiles_ref[item.line, CONTEXT]
    # Columns multiplied at once: a sum of 256 and its addend do not fit in registers.
    chunk = head_dim if head_dim <= 128 else 64

    def step(i: jax.Array, carry: tuple, masked: bool) -> tuple:
        columns, top, total = carry
        at = item.start + i * tile
        slot = lax.rem(done + i, jnp.int32(stages))
        plgpu.barrier_wait(pipe.ready[0].at[slot])
        scores = product(q_smem, transpose_ref(pipe.smem[0].at[slot]))
        plgpu.barrier_arrive(pipe.free[0].at[slot])
        scores = attention.log2_scores(scores)
        if masked:
            # Row r is of token r // group, and column c sees it where at + c <= position +
            # r // group: where r >= group * (at + c - position). So no division is needed.
            row, column = (
                plgpu.broadcasted_iota(jnp.int32, scores.shape, d, layout=plgpu.Layout.WGMMA)
                for d in (0, 1)
            )
            skew = row - column * group
            seen = skew >= group * (at - position)
            if window is not None:
                seen &= skew < group * (at - position + window)
            scores = jnp.where(seen, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=1))
        # A row may have seen nothing yet: exp2(-inf - -inf) would be NaN.
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
        decay = jnp.exp2(top - base)
        weights = jnp.exp2(scores - along(base, scores.shape, 0))
        total = total * decay + weights.sum(axis=1)
        p_smem[...] = weights.astype(p_smem.dtype)
        plgpu.commit_smem()
        plgpu.barrier_wait(pipe.ready[1].at[slot])
        if masked:

            @pl.when(at + tile > context)
            def _() -> None:
                @pl.when(skipped == 0)
                def _() -> None:
                    zero_rows_from(pipe.smem[1].at[slot], context - at)
                    plgpu.barrier_arrive(pipe.clean.at[slot])

                plgpu.barrier_wait(pipe.clean.at[slot])

        columns = tuple(
            part * along(decay, part.shape, 0)
            + product(p_smem, pipe.smem[1].at[slot, :, pl.ds(c * chunk, chunk)])
            for c, part in enumerate(columns)
        )
        plgpu.barrier_arrive(pipe.free[1].at[slot])
        return columns, new_top, total

    # Tiles that all tokens see wholly, between those that the window and causality cut.
    full = lax.div(jnp.maximum(position + 1 - item.start, 0), jnp.int32(tile))
    # The tile with the context's end counts as cut for warpgroups without tokens, too: all wait
    # for its unwritten rows to be zeroed.
    full = jnp.minimum(full, lax.div(context - item.start, jnp.int32(tile)))
    full = jnp.minimum(full, item.steps)
    cut = jnp.int32(0)
    if window is not None:
        last = position + tokens_per_warpgroup(group) - 1
        hidden = jnp.maximum(last - (window - 1) - item.start, 0)
        cut = jnp.minimum(lax.div(hidden + (tile - 1), jnp.int32(tile)), item.steps)
        full = jnp.maximum(full, cut)
    carry = (
        tuple(filled((ROWS, chunk), 0.0) for _ in range(head_dim // chunk)),
        filled((ROWS,), -jnp.inf, axis=1),
        filled((ROWS,), 0.0, axis=1),
    )
    if window is not None:
        carry = lax.fori_loop(0, cut, lambda i, c: step(i, c, masked=True), carry)
    carry = lax.fori_loop(cut, full, lambda i, c: step(i, c, masked=False), carry)
    columns, top, total = lax.fori_loop(
        full, item.steps, lambda i, c: step(i, c, masked=True), carry
    )
    columns = tuple(part / along(total, part.shape, 0) for part in columns)
    return columns, top + jnp.log2(total)


def _store_tokens(
    attention: Attention, item: _Item, skipped: jax.Array, tiles_ref: Any,
    columns: tuple[jax.Array, ...], token_smem: Any, out_ref: Any,
) -> None:  # fmt: skip
    """Writes the tokens of the tile that there really are."""
    group = attention.group
    chunk = columns[0].shape[1]
    for c, part in enumerate(columns):
        token_smem[:, pl.ds(c * chunk, chunk)] = part.astype(token_smem.dtype)
    plgpu.commit_smem()
    token = tiles_ref[item.line, TOKEN] + skipped
    valid = jnp.clip(tiles_ref[item.line, VALID] - skipped, 0, tokens_per_warpgroup(group))

    def copy(i: jax.Array, _: None) -> None:
        plgpu.copy_smem_to_gmem(
            token_smem.at[pl.ds(i * group, group)], out_ref.at[token + i, item.head]
        )

    lax.fori_loop(0, valid, copy, None)
    plgpu.wait_smem_to_gmem(0)


def lse_of_tokens(
    lse: jax.Array, plan: PrefillPlan, batch: PagedBatch, num_tokens: int, group: int
) -> jax.Array:
    """Gathers `prefill`'s second result: float32 [tokens, kv_heads, group]."""
    workers, size = lse.shape[2], tokens_per_warpgroup(group)
    row, _ = batch.rows_of_tokens(num_tokens)
    index = jnp.arange(num_tokens, dtype=jnp.int32) - batch.query_start[row]
    tile = jnp.clip(plan.first[row] + index // (workers * size), 0, lse.shape[0] - 1)
    worker = index // size % workers
    first = index % size * group
    rows = first[:, None] + jnp.arange(group)
    return jnp.moveaxis(lse[tile, :, worker], 1, 2)[jnp.arange(num_tokens)[:, None], rows].swapaxes(
        1, 2
    )
