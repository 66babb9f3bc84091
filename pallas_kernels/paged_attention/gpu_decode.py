"""Decode rows on Hopper: one query token each, bound by how fast K and V arrive.

Work is a line of units, one tile of K and V each, ordered by row, KV head and position. Every
thread block takes an equal piece of the line whatever rows it holds (LeanAttention's stream-K,
Sanovar et al. 2024): one long context is spread over the whole GPU, and padding costs nothing.
A (row, head) that falls into one piece is finished there; one that does not leaves a partial
result per block (at most two of a block's are partial: its first and its last), and a second
kernel merges them (flash-decoding).

Products are transposed, scores = K q^T and out = V^T p^T, so that the 64 rows that the tensor
cores insist on are positions and head columns; the few query heads are padded to 8 columns.
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

ROW, TOKEN, CONTEXT, SEEN, START, TILES, UNITS = range(7)  # columns of DecodePlan.rows
TOTAL, SHARE = range(2)  # entries of DecodePlan.header


class DecodePlan(NamedTuple):
    """Which tiles there are, and who takes which.

    Attributes:
        header: int32 [2]: units altogether, units per block.
        rows: int32 [rows, 7], decode rows first, one per line: row of the batch, its token, its
            context, the first position it sees, where its tiles begin, how many there are, and
            how many units there are before it.
        first: int32 [blocks]: the line of `rows` that a block begins in.
    """

    header: jax.Array
    rows: jax.Array
    first: jax.Array


def plan_decode(batch: PagedBatch, attention: Attention, tiles: GpuTiles) -> DecodePlan:
    """Lays out the line of units. Layers of equal windows share it: XLA computes it once."""
    num_rows = batch.query_len.shape[0]
    decodes = batch.query_len == 1
    row = jnp.searchsorted(
        jnp.cumsum(decodes), jnp.arange(1, num_rows + 1), method="compare_all"
    ).astype(jnp.int32)
    real = row < num_rows
    row = jnp.where(real, row, 0)
    context = jnp.where(real, batch.context_len[row], 0)
    window = attention.sliding_window
    seen = jnp.zeros_like(context) if window is None else jnp.maximum(context - window, 0)
    start = attention.first_tile_position(seen, tiles.decode_tile)
    count = jnp.where(real, -(-(context - start) // tiles.decode_tile), 0)
    after = jnp.cumsum(count * attention.kv_heads).astype(jnp.int32)
    total = after[-1]
    share = jnp.maximum(-(-total // tiles.decode_blocks), tiles.decode_share)
    before = after - count * attention.kv_heads
    fields = (row, batch.query_start[row], context, seen, start, count, before)
    begins = jnp.arange(tiles.decode_blocks, dtype=jnp.int32) * share
    first = jnp.searchsorted(after, begins, side="right", method="compare_all")
    return DecodePlan(
        jnp.stack([total, share]).astype(jnp.int32),
        jnp.stack(fields, axis=1).astype(jnp.int32),
        jnp.minimum(first, num_rows - 1).astype(jnp.int32),
    )


class _Cursor(NamedTuple):
    """A unit: line of the plan, KV head, tile of that head, and how many tiles it has."""

    line: jax.Array
    head: jax.Array
    tile: jax.Array
    tiles: jax.Array

    @classmethod
    def at(cls, unit: jax.Array, line: jax.Array, rows_ref: Any) -> "_Cursor":
        count = jnp.maximum(rows_ref[line, TILES], 1)
        inside = unit - rows_ref[line, UNITS]
        head = lax.div(inside, count)
        return cls(line, head, inside - head * count, count)

    def next(self, kv_heads: int, rows_ref: Any) -> "_Cursor":
        wraps = (self.tile + 1 == self.tiles).astype(jnp.int32)
        tile = (self.tile + 1) * (1 - wraps)
        ends = wraps * (self.head + 1 == kv_heads).astype(jnp.int32)
        head = (self.head + wraps) * (1 - ends)
        line = jnp.minimum(self.line + ends, rows_ref.shape[0] - 1)
        return _Cursor(line, head, tile, rows_ref[line, TILES])


def columns(group: int) -> int:
    """Query heads of a KV head, padded to what a product may have as columns."""
    return -(-group // 8) * 8


@functools.partial(jax.jit, static_argnames=("attention", "tiles"))
def decode(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    layer: jax.Array,
    plan: DecodePlan,
    attention: Attention,
    tiles: GpuTiles,
) -> tuple[jax.Array, jax.Array]:
    """Attention of the decode rows' tokens; other tokens' places are not written.

    Args:
        q: [tokens, kv_heads, group, head_dim].
        pool: [layers * pages * 2 * kv_heads, page_size, head_dim].
        page_table: int32 [rows, max_pages].
        layer: int32 [1]: an operand, so that all layers share one kernel, lowered once.
        plan: from `plan_decode`.
        attention: the call's constants.
        tiles: block sizes.

    Returns:
        out like q, and the log2 of the sum of exp2 of scores, float32 [tokens, kv_heads,
        columns(group)].
    """
    num_tokens, kv_heads, group, head_dim = q.shape
    wide, blocks, tile = columns(group), tiles.decode_blocks, tiles.decode_tile
    stages, copies = tiles.decode_stages, 2 * max(1, tiles.decode_tile // attention.page_size)
    f32 = jnp.float32
    out, lse, partial_out, partial_lse = mosaic_gpu_kernel(
        lambda *refs: _decode_body(attention, tiles, *refs),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((num_tokens, kv_heads, wide), f32),
            jax.ShapeDtypeStruct((blocks, 2, head_dim, wide), f32),
            jax.ShapeDtypeStruct((blocks, 2, wide), f32),
        ),
        scratch_types=(
            plgpu.SMEM((stages + 1, wide, head_dim), q.dtype, transforms=OPERAND),
            plgpu.SMEM((stages, tile, head_dim), q.dtype, transforms=OPERAND),
            plgpu.SMEM((stages, tile, head_dim), q.dtype, transforms=OPERAND),
            plgpu.SMEM((wide, tile), q.dtype, transforms=OPERAND),
            plgpu.SMEM((wide, head_dim), q.dtype),
            plgpu.Barrier(num_barriers=stages + 1),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        ),
        grid=blocks,
        name="paged_decode",
    )(layer, plan.header, plan.rows, plan.first, page_table, q, pool)
    out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
    mosaic_gpu_kernel(
        lambda *refs: _merge_body(attention, *refs),
        out_type=(),
        scratch_types=(plgpu.SMEM((wide, head_dim), q.dtype),),
        grid=blocks,
        name="paged_decode_merge",
    )(plan.header, plan.rows, plan.first, partial_out, partial_lse, out_ref, lse_ref)
    return jax.freeze(out_ref), jax.freeze(lse_ref)


class _Block(NamedTuple):
    """What a thread block of the decode kernel works on and with: Refs, and its piece."""

    layer: Any
    rows: Any
    table: Any
    q: Any
    pool: Any
    q_smem: Any
    k_smem: Any
    v_smem: Any
    q_ready: Any
    kv_ready: Any
    begin: jax.Array
    end: jax.Array

    def starts(self, cursor: _Cursor, unit: jax.Array) -> jax.Array:
        """Whether a unit is the first of a (row, head) in this block."""
        return (cursor.tile == 0) | (unit == self.begin)

    def q_slot(self, segment: jax.Array) -> jax.Array:
        return lax.rem(segment, jnp.int32(self.q_smem.shape[0]))

    def slot(self, unit: jax.Array) -> jax.Array:
        return lax.rem(unit, jnp.int32(self.k_smem.shape[0]))


class _Ahead(NamedTuple):
    """The next unit to fetch, and how many (row, head) were begun before it, less one."""

    cursor: _Cursor
    segment: jax.Array


def _fetch(attention: Attention, block: _Block, unit: jax.Array, ahead: _Ahead) -> _Ahead:
    """Starts the copies of a unit, and of its queries where a (row, head) begins."""
    cursor, rows_ref = ahead.cursor, block.rows
    tile = block.k_smem.shape[1]
    position = rows_ref[cursor.line, START] + cursor.tile * tile
    last = lax.div(rows_ref[cursor.line, CONTEXT] - 1, jnp.int32(attention.page_size))
    row = rows_ref[cursor.line, ROW]
    pages = attention.pages_of_tile(position, block.table, row, last, tile)
    starts = block.starts(cursor, unit)
    segment = ahead.segment + starts.astype(jnp.int32)

    @pl.when(starts)
    def _() -> None:
        # The slice is as wide as the padded group, and TMA fills in zeros; that its start is
        # no constant keeps JAX from rejecting it.
        wide, slot = block.q_smem.shape[1], block.q_slot(segment)
        heads = pl.ds(block.layer[0] * 0, wide)
        source = block.q.at[rows_ref[cursor.line, TOKEN], cursor.head, heads]
        plgpu.copy_gmem_to_smem(source, block.q_smem.at[slot], block.q_ready.at[slot])

    slot, layer = block.slot(unit), block.layer[0]
    for kind, smem in enumerate((block.k_smem, block.v_smem)):
        attention.copy_tile(
            block.pool, pages, kind, cursor.head, position, layer, smem.at[slot],
            block.kv_ready.at[slot],
        )  # fmt: skip
    return _Ahead(cursor.next(attention.kv_heads, rows_ref), segment)


def _fetch_if(
    there: jax.Array, attention: Attention, block: _Block, unit: jax.Array, ahead: _Ahead
) -> _Ahead:
    return lax.cond(
        there, lambda ahead: _fetch(attention, block, unit, ahead), lambda ahead: ahead, ahead
    )


class _State(NamedTuple):
    """What one (row, head) has come to: FlashAttention's output, maximum and sum, unreduced.

    The sum is kept per position of a tile, so that only the maximum is reduced every turn.
    """

    acc: jax.Array
    top: jax.Array
    total: jax.Array

    def restarted_if(self, starts: jax.Array) -> "_State":
        """Emptied where a (row, head) starts; a product with zero would carry NaN over."""

        def emptied(values: jax.Array, empty: float) -> jax.Array:
            return jnp.where(jnp.broadcast_to(starts, values.shape), empty, values)

        return _State(emptied(self.acc, 0.0), emptied(self.top, -jnp.inf), emptied(self.total, 0.0))


def _attend(
    attention: Attention, block: _Block, here: _Cursor, unit: jax.Array, segment: jax.Array,
    p_smem: Any, state: _State,
) -> _State:  # fmt: skip
    """Adds one tile of K and V to a (row, head)."""
    slot, q_slot = block.slot(unit), block.q_slot(segment)
    tile = block.k_smem.shape[1]
    starts = block.starts(here, unit)
    context = block.rows[here.line, CONTEXT]
    position = block.rows[here.line, START] + here.tile * tile

    @pl.when(starts)
    def _() -> None:
        plgpu.barrier_wait(block.q_ready.at[q_slot])

    plgpu.barrier_wait(block.kv_ready.at[slot])

    @pl.when(position + tile > context)
    def _() -> None:
        zero_rows_from(block.v_smem.at[slot], context - position)

    scores = product(block.k_smem.at[slot], transpose_ref(block.q_smem.at[q_slot]))
    scores = attention.log2_scores(scores)
    at = position + plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
    seen = at < context
    if attention.sliding_window is not None:
        seen &= at >= block.rows[here.line, SEEN]
    scores = jnp.where(seen, scores, -jnp.inf)
    # Every tile holds a position that is seen, since tiles begin at the page or tile with the
    # first one: so top is finite, and nothing below is inf - inf.
    state = state.restarted_if(starts)
    top = jnp.maximum(state.top, scores.max(axis=0))
    decay = jnp.exp2(state.top - top)
    weights = jnp.exp2(scores - along(top, scores.shape, 1))
    total = state.total * along(decay, state.total.shape, 1) + weights
    transpose_ref(p_smem)[...] = plgpu.layout_cast(
        weights.astype(p_smem.dtype), plgpu.Layout.WGMMA_TRANSPOSED
    )
    plgpu.commit_smem()
    acc = state.acc * along(decay, state.acc.shape, 1)
    acc += product(transpose_ref(block.v_smem.at[slot]), transpose_ref(p_smem))
    return _State(acc, top, total)


def _decode_body(
    attention: Attention, tiles: GpuTiles,
    layer_ref: Any, header_ref: Any, rows_ref: Any, first_ref: Any, table_ref: Any, q_ref: Any,
    pool_ref: Any, out_ref: Any, lse_ref: Any, partial_out_ref: Any, partial_lse_ref: Any,
    q_smem: Any, k_smem: Any, v_smem: Any, p_smem: Any, out_smem: Any, q_ready: Any, kv_ready: Any,
) -> None:  # fmt: skip
    """One thread block: its piece of the line, tile by tile, copies running ahead."""
    stages, index = tiles.decode_stages, lax.axis_index("block")
    begin = index * header_ref[SHARE]
    end = jnp.minimum(begin + header_ref[SHARE], header_ref[TOTAL])
    block = _Block(
        layer_ref, rows_ref, table_ref, q_ref, pool_ref, q_smem, k_smem, v_smem, q_ready,
        kv_ready, begin, end,
    )  # fmt: skip

    def finish(here: _Cursor, unit: jax.Array, state: _State) -> None:
        total = state.total.sum(axis=0)
        lse = state.top + jnp.log2(total)
        out = state.acc / along(total, state.acc.shape, 1)
        starts_here = unit - here.tile >= begin
        whole = starts_here & (here.tile + 1 == here.tiles)

        @pl.when(whole)
        def _() -> None:
            token = rows_ref[here.line, TOKEN]
            lse_ref[token, here.head] = lse
            _store(out, out_smem, out_ref.at[token, here.head])

        @pl.when(jnp.logical_not(whole))
        def _() -> None:
            which = starts_here.astype(jnp.int32)
            partial_out_ref[index, which] = out
            partial_lse_ref[index, which] = lse

    def step(unit: jax.Array, carry: tuple) -> tuple:
        here, segment, ahead, state = carry
        segment = segment + block.starts(here, unit).astype(jnp.int32)
        state = _attend(attention, block, here, unit, segment, p_smem, state)
        ahead = _fetch_if(unit + stages < end, attention, block, unit + stages, ahead)

        @pl.when((here.tile + 1 == here.tiles) | (unit + 1 == end))
        def _() -> None:
            finish(here, unit, state)

        return here.next(attention.kv_heads, rows_ref), segment, ahead, state

    here = _Cursor.at(begin, first_ref[index], rows_ref)
    ahead = _Ahead(here, jnp.int32(-1))
    for i in range(stages):
        ahead = _fetch_if(begin + i < end, attention, block, begin + i, ahead)
    wide, head_dim = out_smem.shape
    state = _State(
        filled((head_dim, wide), 0.0),
        filled((wide,), -jnp.inf, axis=0),
        filled((tiles.decode_tile, wide), 0.0),
    )
    lax.fori_loop(begin, end, step, (here, jnp.int32(-1), ahead, state))
    plgpu.wait_smem_to_gmem(0)


def _store(out: jax.Array, smem: Any, destination: Any) -> None:
    """Writes [head_dim, columns] to a [group, head_dim] place of the output."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last one's copy has left smem
    transpose_ref(smem)[...] = plgpu.layout_cast(
        out.astype(smem.dtype), plgpu.Layout.WGMMA_TRANSPOSED
    )
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.at[pl.ds(0, destination.shape[0])], destination)


def _merge_body(
    attention: Attention, header_ref: Any, rows_ref: Any, first_ref: Any, partial_out_ref: Any,
    partial_lse_ref: Any, out_ref: Any, lse_ref: Any, out_smem: Any,
) -> None:  # fmt: skip
    """Merges the parts of the (row, head) that this thread block was the second to work on."""
    wide, head_dim = out_smem.shape
    block = lax.axis_index("block")
    share = header_ref[SHARE]
    unit = block * share

    @pl.when(unit < header_ref[TOTAL])
    def _() -> None:
        here = _Cursor.at(unit, first_ref[block], rows_ref)
        first = unit - here.tile

        @pl.when((here.tile > 0) & (first >= unit - share))
        def _() -> None:
            last = lax.div(first + here.tiles - 1, share)

            def merge(part: jax.Array, carry: tuple) -> tuple:
                acc, top, total = carry
                which = (part < block).astype(jnp.int32)
                lse = load_ref(
                    partial_lse_ref.at[part, which], plgpu.Layout.WGMMA.reduce(0), optimized=False
                )
                out = load_ref(partial_out_ref.at[part, which], plgpu.Layout.WGMMA, optimized=False)
                new_top = jnp.maximum(top, lse)
                decay, weight = jnp.exp2(top - new_top), jnp.exp2(lse - new_top)
                acc = acc * along(decay, acc.shape, 1) + out * along(weight, acc.shape, 1)
                return acc, new_top, total * decay + weight

            acc, top, total = lax.fori_loop(
                block - 1, last + 1, merge,
                (
                    filled((head_dim, wide), 0.0), filled((wide,), -jnp.inf, axis=0),
                    filled((wide,), 0.0, axis=0),
                ),
            )  # fmt: skip
            token = rows_ref[here.line, TOKEN]
            lse_ref[token, here.head] = top + jnp.log2(total)
            _store(acc / along(total, acc.shape, 1), out_smem, out_ref.at[token, here.head])
            plgpu.wait_smem_to_gmem(0)
