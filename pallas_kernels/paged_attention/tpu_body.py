"""The body of the TPU kernel: one program computes one block of consecutive query tokens.

    program -> rows that own tokens of the block -> blocks of that row's pages (run-time count)

A work item is (query block, row, page block). While one item is computed, the pages of the item
after it are on their way into the other half of a double buffer, across rows and across the
programs of a core, so that memory does not idle between short rows. What has arrived is computed
in chunks, up to the end of the context: large copies for the memory, small products for short
contexts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_layout import tile_rows

MASKED = -1e30  # finite: a row with nothing to see must not turn into NaN


class Rules(NamedTuple):
    """What is fixed at trace time.

    Attributes:
        scale, soft_cap: see `paged_attention`.
        windowed: whether there is a sliding window (its size is a run-time scalar).
        query_tokens: query tokens of one program.
        pages_per_block: pages of one work item.
        pages_per_chunk: pages of one product; divides pages_per_block.
        cores: TensorCores that share the call.
    """

    scale: float
    soft_cap: float | None
    windowed: bool
    query_tokens: int
    pages_per_block: int
    pages_per_chunk: int
    cores: int


class Scalars(NamedTuple):
    """Refs in scalar memory (SMEM).

    Attributes:
        call: int32 [4]: layer, sliding window, number of real rows, number of query blocks.
        first_row: int32 [blocks + cores]: the first row that reaches into a query block.
        start, length, context: int32 [rows], as in `PagedBatch`.
        table: int32 [rows * max_pages]; flat, since SMEM pads the last axis of a matrix.
    """

    call: Any
    first_row: Any
    start: Any
    length: Any
    context: Any
    table: Any


class Scratch(NamedTuple):
    """Refs that live for the whole call.

    Attributes:
        kv: [2 (slot), 2 (K, V), kv_heads, block, head_dim], in the pool's dtype; of a joined pool
            (`kv_pages.pool_parts`) [2, 1, kv_heads, block, 2 * head_dim], and all that head_dim
            is said to be below is its double.
        scales: float32 [2 (slot), pages, 2 (K, V), kv_heads, page_size] of a quantised pool, or
            None.
        semaphores: DMA [2], one per slot.
        slot: int32 [1] in SMEM: the slot that holds the next item.
        out: float32 [query_tokens, heads, head_dim]: 32 bits wide, because one row's heads
            are stored at any sublane, which packed dtypes do not allow.
        token_state: float32 [2, heads, 128]: running maximum and sum of a decode row.
        token_acc: float32 [heads, head_dim].
        tile_q: [kv_heads, query_tokens * group, head_dim] in q's dtype.
        tile_state: float32 [2, kv_heads, query_tokens * group, 128], as `token_state`.
        tile_acc: float32 [kv_heads, query_tokens * group, head_dim].
    """

    kv: Any
    semaphores: Any
    slot: Any
    out: Any
    token_state: Any
    token_acc: Any
    tile_q: Any
    tile_state: Any
    tile_acc: Any
    scales: Any = None


class Chunk(NamedTuple):
    """Pages that are multiplied at once.

    Attributes:
        kv: ref, [2 (K, V), kv_heads, chunk, head_dim].
        scales: ref, float32 [pages, 2 (K, V), kv_heads, page_size], or None.
    """

    kv: Any
    scales: Any

    def rows(self, kind: int, head: Any, dtype: Any) -> jax.Array:
        """One head's keys (kind 0) or values (1) [chunk, head_dim]; codes of quantised ones."""
        rows = self.kv[min(kind, self.kv.shape[0] - 1), head]
        return (rows if self.scales is None else rows.astype(jnp.float32)).astype(dtype)

    def scaled(self, x: jax.Array, kind: int, head: Any) -> jax.Array:
        """Scores of keys, or weights of values, [rows, chunk] times the scales of a head's."""
        if self.scales is None:
            return x
        pages = range(self.scales.shape[0])
        parts = [self.scales[page, kind, pl.ds(head, 1)] for page in pages]
        return x * jnp.concatenate(parts, axis=1)

    def weights(self, weights: jax.Array, seen: jax.Array, head: Any) -> jax.Array:
        """What a head's values, or their codes, are multiplied with."""
        if self.scales is None:
            return weights
        # Scales of slots that were never written may be NaN.
        return jnp.where(seen, self.scaled(weights, 1, head), 0)


class Span(NamedTuple):
    """What one row shows to one query block: int32 scalars.

    Attributes:
        first_page: index into the row's page table.
        num_pages: pages in sight.
        end: position behind the last one in sight.
        offset: a token's position is its number in the flat array plus this.
    """

    first_page: jax.Array
    num_pages: jax.Array
    end: jax.Array
    offset: jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
    """One program's refs, and the arithmetic of its work items.

    Attributes:
        block: int32 scalar, the query block.
        q: [query_tokens, heads, head_dim].
        lse: float32 [query_tokens, heads, 128], or None if nobody asked.
        pool: [layers, pages, 2, kv_heads, page_size, head_dim] in HBM.
        scales: float32 [layers, pages, 2, kv_heads, page_size] in HBM, or None.
    """

    rules: Rules
    scalars: Scalars
    scratch: Scratch
    block: jax.Array
    q: Any
    lse: Any
    pool: Any
    scales: Any = None

    def span(self, block: jax.Array, row: jax.Array) -> Span:
        """What `row` shows to query block `block`."""
        tokens, page_size = self.rules.query_tokens, self.pool.shape[4]
        start, length = self.scalars.start[row], self.scalars.length[row]
        offset = self.scalars.context[row] - length - start
        end = jnp.minimum(start + length, (block + 1) * tokens) + offset
        first_page = jnp.int32(0)
        if self.rules.windowed:
            first = jnp.maximum(start, block * tokens) + offset - self.scalars.call[1] + 1
            first_page = lax.div(jnp.maximum(first, 0), page_size)
        return Span(first_page, pl.cdiv(end, page_size) - first_page, end, offset)

    def has(self, block: jax.Array, row: jax.Array) -> jax.Array:
        """Whether `row` is a row, and one that begins before the end of query block `block`."""
        clipped = jnp.minimum(row, self.scalars.start.shape[0] - 1)
        begun = self.scalars.start[clipped] < (block + 1) * self.rules.query_tokens
        return (row < self.scalars.call[2]) & begun

    def num_blocks(self, span: Span) -> jax.Array:
        """Work items of a row."""
        return pl.cdiv(span.num_pages, self.rules.pages_per_block)

    def fetch(self, block: jax.Array, row: jax.Array, index: jax.Array, slot: jax.Array) -> None:
        """Start the copies of the pages of one work item."""
        span = self.span(block, row)
        page_size = self.pool.shape[4]
        max_pages = self.scalars.table.shape[0] // self.scalars.start.shape[0]
        first = row * max_pages + span.first_page + index * self.rules.pages_per_block

        def one(i: jax.Array, _: None) -> None:
            page = self.scalars.table[first + i]
            rows = pl.ds(pl.multiple_of(i * page_size, page_size), page_size)
            pltpu.make_async_copy(
                self.pool.at[self.scalars.call[0], page],
                self.scratch.kv.at[slot, :, :, rows],
                self.scratch.semaphores.at[slot],
            ).start()
            if self.scales is not None:
                pltpu.make_async_copy(
                    self.scales.at[self.scalars.call[0], page],
                    self.scratch.scales.at[slot, i],
                    self.scratch.semaphores.at[slot],
                ).start()

        lax.fori_loop(0, self._pages(span, index), one, None)

    def fetch_next(self, row: jax.Array, index: jax.Array, span: Span, slot: jax.Array) -> None:
        """Start the copies of the work item behind (row, index), whoever's it is."""
        more = index + 1 < self.num_blocks(span)
        here = more | self.has(self.block, row + 1)
        block = jnp.where(here, self.block, self.block + self.rules.cores)
        next_row = jnp.where(here, row + 1, self.scalars.first_row[block])
        next_row = jnp.where(more, row, next_row)

        @pl.when(here | (block < self.scalars.call[3]))
        def _() -> None:
            self.fetch(block, next_row, jnp.where(more, index + 1, 0), slot)

    def arrive(self, index: jax.Array, span: Span, slot: jax.Array) -> None:
        """Wait for a work item's pages, and zero V behind the end of the context.

        Slots that were never written may hold NaN, pages that were not fetched another
        request's values, and 0 * NaN is NaN.
        """
        page_size = self.pool.shape[4]
        pages = self._pages(span, index)

        def one(_: jax.Array, __: None) -> None:
            pltpu.make_async_copy(  # only its size and its semaphore matter to a wait
                self.pool.at[0, 0],
                self.scratch.kv.at[slot, :, :, pl.ds(0, page_size)],
                self.scratch.semaphores.at[slot],
            ).wait()
            if self.scales is not None:
                pltpu.make_async_copy(
                    self.scales.at[0, 0],
                    self.scratch.scales.at[slot, 0],
                    self.scratch.semaphores.at[slot],
                ).wait()

        lax.fori_loop(0, pages, one, None)
        kv = self.scratch.kv
        if jnp.issubdtype(kv.dtype, jnp.integer):
            return  # codes are never NaN, and weights carry their scales
        tile, last = tile_rows(kv.dtype), kv.shape[1] - 1
        chunk = self.rules.pages_per_chunk * page_size
        end = span.end - self.first_position(index, span)  # within this block

        def clear(i: jax.Array, _: None) -> None:
            rows = pl.ds(pl.multiple_of(i * tile, tile), tile)
            v = kv[slot, last, :, rows].astype(jnp.float32)
            position = i * tile + lax.broadcasted_iota(jnp.int32, v.shape, 1)
            kv[slot, last, :, rows] = jnp.where(position < end, v, 0).astype(kv.dtype)

        computed = self.num_chunks(index, span) * (chunk // tile)
        lax.fori_loop(lax.div(end, tile), computed, clear, None)

    def num_chunks(self, index: jax.Array, span: Span) -> jax.Array:
        """Products of a work item."""
        return pl.cdiv(self._pages(span, index), self.rules.pages_per_chunk)

    def chunk(self, slot: jax.Array, index: jax.Array) -> Chunk:
        """Product `index` of the work item in a slot."""
        pages, page_size = self.rules.pages_per_chunk, self.pool.shape[4]
        size = pages * page_size
        rows = pl.ds(pl.multiple_of(index * size, size), size)
        scales = None
        if self.scales is not None:
            scales = self.scratch.scales.at[slot, pl.ds(index * pages, pages)]
        return Chunk(self.scratch.kv.at[slot, :, :, rows], scales)

    def first_position(self, index: jax.Array, span: Span) -> jax.Array:
        """Absolute position of the first slot of a work item."""
        return (span.first_page + index * self.rules.pages_per_block) * self.pool.shape[4]

    def _pages(self, span: Span, index: jax.Array) -> jax.Array:
        width = self.rules.pages_per_block
        return jnp.minimum(width, span.num_pages - index * width)


def run(program: Program, is_first: jax.Array) -> None:
    """Compute all rows of the program's query block into `scratch.out` and `lse`.

    Args:
        program: the program.
        is_first: whether it is the first of its core, whose pages nobody has asked for yet.
    """
    scalars, slot_ref = program.scalars, program.scratch.slot
    first = scalars.first_row[program.block]

    @pl.when(is_first)
    def _() -> None:
        slot_ref[0] = jnp.int32(0)
        program.fetch(program.block, first, jnp.int32(0), jnp.int32(0))

    def one_row(state: tuple) -> tuple:
        row, slot, folded = state
        span = program.span(program.block, row)
        blocks = program.num_blocks(span)
        decode = scalars.length[row] == 1

        def pipeline(compute: Callable[[Chunk, jax.Array, Span], None]) -> None:
            chunk = program.rules.pages_per_chunk * program.pool.shape[4]

            def one_block(index: jax.Array, slot: jax.Array) -> jax.Array:
                program.fetch_next(row, index, span, 1 - slot)
                program.arrive(index, span, slot)
                first = program.first_position(index, span)

                def one_chunk(i: jax.Array, _: None) -> None:
                    compute(program.chunk(slot, i), first + i * chunk, span)

                lax.fori_loop(0, program.num_chunks(index, span), one_chunk, None)
                return 1 - slot

            lax.fori_loop(0, blocks, one_block, slot)

        @pl.when(decode)
        def _() -> None:
            decode_row(program, row, pipeline)

        if program.rules.query_tokens > 1:

            @pl.when(jnp.logical_not(decode))
            def _() -> None:
                pl.when(folded == 0)(lambda: fold_queries(program))
                prefill_row(program, row, pipeline)

        return row + 1, (slot + blocks) % 2, jnp.where(decode, folded, 1)

    def more(state: tuple) -> jax.Array:
        return program.has(program.block, state[0])

    state = (first, slot_ref[0], jnp.int32(0))
    slot_ref[0] = lax.while_loop(more, one_row, state)[1]


def decode_row(program: Program, row: jax.Array, pipeline: Callable) -> None:
    """One query token: all heads at once, [heads, block].

    Every KV head's keys are multiplied with the queries of all heads, and the scores of heads
    that are not its own dropped. That fills the sublanes (a group alone has 1 to 8 rows of a
    tile's 8), and the matrix unit does not notice: it is busy loading K and V.
    """
    rules, scratch = program.rules, program.scratch
    kv_heads, heads = scratch.kv.shape[2], program.q.shape[1]
    token = program.scalars.start[row] - program.block * rules.query_tokens
    scratch.token_state[0] = jnp.full(scratch.token_state.shape[1:], MASKED)
    scratch.token_state[1] = jnp.zeros(scratch.token_state.shape[1:])
    scratch.token_acc[...] = jnp.zeros(scratch.token_acc.shape)

    def own(head: int, mine: jax.Array, others: jax.Array | None) -> jax.Array:
        if others is None:
            return mine
        head_of_row = lax.broadcasted_iota(jnp.int32, mine.shape, 0)
        return jnp.where(head_of_row >= head * (heads // kv_heads), mine, others)

    def compute(chunk: Chunk, first: jax.Array, span: Span) -> None:
        q = program.q[token]
        scores = None
        for head in range(kv_heads):
            mine = _matmul(q, chunk.rows(0, head, q.dtype), transposed=True)
            scores = own(head, chunk.scaled(mine, 0, head), scores)
        scores = _shape_scores(scores, rules)
        position = first + lax.broadcasted_iota(jnp.int32, (1, scores.shape[1]), 1)
        seen = position < span.end
        if rules.windowed:
            seen &= position >= span.end - program.scalars.call[1]
        scores = jnp.where(seen, scores, MASKED)
        weights, fade = _softmax_step(scores, scratch.token_state)
        new = None
        for head in range(kv_heads):
            mine = chunk.weights(weights, seen, head).astype(q.dtype)
            new = own(head, _matmul(mine, chunk.rows(1, head, q.dtype)), new)
        scratch.token_acc[...] = scratch.token_acc[...] * fade + new

    pipeline(compute)
    highest, total = scratch.token_state[0], scratch.token_state[1]
    scratch.out[token] = scratch.token_acc[...] / total[:, :1]
    if program.lse is not None:
        program.lse[token] = highest + jnp.log(total)


def fold_queries(program: Program) -> None:
    """Turn [tokens, heads, head_dim] into one matrix per KV head with rows (token, group)."""
    tile = program.scratch.tile_q
    kv_heads, rows, head_dim = tile.shape
    group = program.q.shape[1] // kv_heads
    for head in range(kv_heads):
        # In 32 bits: rows of packed dtypes cannot be moved one by one.
        q = program.q[:, head * group : (head + 1) * group, :].astype(jnp.float32)
        tile[head] = q.reshape(rows, head_dim).astype(tile.dtype)


def prefill_row(program: Program, row: jax.Array, pipeline: Callable) -> None:
    """All query tokens of the block against one row's keys; only the row's own are kept."""
    rules, scratch, scalars = program.rules, program.scratch, program.scalars
    kv_heads, rows = scratch.tile_q.shape[:2]
    group = rows // rules.query_tokens
    first_token = program.block * rules.query_tokens
    scratch.tile_state[0] = jnp.full(scratch.tile_state.shape[1:], MASKED)
    scratch.tile_state[1] = jnp.zeros(scratch.tile_state.shape[1:])
    scratch.tile_acc[...] = jnp.zeros(scratch.tile_acc.shape)

    def compute(chunk: Chunk, first: jax.Array, span: Span) -> None:
        def one_head(head: jax.Array, _: None) -> None:
            q = scratch.tile_q[head]
            scores = _matmul(q, chunk.rows(0, head, q.dtype), transposed=True)
            scores = _shape_scores(chunk.scaled(scores, 0, head), rules)
            position = first + lax.broadcasted_iota(jnp.int32, (1, scores.shape[1]), 1)
            token = lax.div(lax.broadcasted_iota(jnp.int32, (rows, 1), 0), group)
            own = first_token + token + span.offset
            seen = position <= own
            if rules.windowed:
                seen &= position > own - scalars.call[1]
            scores = jnp.where(seen, scores, MASKED)
            weights, fade = _softmax_step(scores, scratch.tile_state.at[:, head])
            mine = chunk.weights(weights, seen, head).astype(q.dtype)
            new = _matmul(mine, chunk.rows(1, head, q.dtype))
            scratch.tile_acc[head] = scratch.tile_acc[head] * fade + new

        lax.fori_loop(0, kv_heads, one_head, None)

    pipeline(compute)
    begin = scalars.start[row] - first_token
    end = begin + scalars.length[row]
    for head in range(kv_heads):
        highest, total = scratch.tile_state[0, head], scratch.tile_state[1, head]
        out = scratch.tile_acc[head] / total[:, :1]
        _merge(out, scratch.out, head, begin, end)
        if program.lse is not None:
            _merge(highest + jnp.log(total), program.lse, head, begin, end)


def _merge(rows: jax.Array, target: Any, head: int, begin: jax.Array, end: jax.Array) -> None:
    """Store rows (token, group) of one KV head where begin <= token < end."""
    tokens = target.shape[0]
    group = rows.shape[0] // tokens
    heads = slice(head * group, (head + 1) * group)
    new = rows.reshape(tokens, group, rows.shape[1])
    token = lax.broadcasted_iota(jnp.int32, new.shape, 0)
    target[:, heads, :] = jnp.where((token >= begin) & (token < end), new, target[:, heads, :])


def _matmul(a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
    """a @ b, or a @ b.T, in float32."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _shape_scores(scores: jax.Array | None, rules: Rules) -> jax.Array:
    assert scores is not None
    scores = scores * rules.scale
    if rules.soft_cap is not None:
        scores = rules.soft_cap * jnp.tanh(scores / rules.soft_cap)
    return scores


def _softmax_step(scores: jax.Array, state: Any) -> tuple[jax.Array, jax.Array]:
    """One step of the online softmax.

    Args:
        scores: float32 [rows, block].
        state: ref, float32 [2, rows, 128]: running maximum and sum, the same in every lane.

    Returns:
        Weights [rows, block], and what earlier sums are to be multiplied by, [rows, 1].
    """
    highest = state[0, :, :1]
    new_highest = jnp.maximum(highest, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - new_highest)
    fade = jnp.exp(highest - new_highest)
    total = state[1, :, :1] * fade + jnp.sum(weights, axis=1, keepdims=True)
    shape = state.shape[1:]
    state[0] = jnp.broadcast_to(new_highest, shape)
    state[1] = jnp.broadcast_to(total, shape)
    return weights, fade
