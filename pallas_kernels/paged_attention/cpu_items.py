"""How one custom call of paged attention falls into items, and what joins their results.

What becomes of an item depends on how the pool's numbers lie in memory: `cpu_call` and
`cpu_codes_call` have a custom call each, so that only what is needed is compiled.
"""

import math

import numpy as np
from numba import njit

from pallas_kernels.cpu_calls.handler import (
    FLOAT32,
    INT8,
    UINT8,
    begins,
    data,
    ends,
    itemsize,
    kind,
    num_results,
    num_threads,
    operand,
    result,
    size,
)
from pallas_kernels.cpu_calls.memory import allocate, floats, ints, release, words
from pallas_kernels.cpu_calls.tiles import padded
from pallas_kernels.paged_attention import cpu_parts
from pallas_kernels.paged_attention.cpu_decode import BLOCK, decode, decode_scratch
from pallas_kernels.paged_attention.cpu_parts import MASKED, KernelShape
from pallas_kernels.paged_attention.cpu_prefill import prefill, prefill_scratch, prefill_tile

DECODE_ITEMS = 16  # per thread, about: one that comes late leaves enough to the others
# The call's operands.
_Q, _POOL, _WHERE, _RULES, _QUERY_START, _QUERY_LEN, _CONTEXT_LEN, _PAGE_TABLE, _SCALES = range(9)


@njit(forceinline=True)
def _row_field(frame, field, row):  # type: ignore[no-untyped-def]
    return np.int64(ints(data(operand(frame, field)), row + 1)[row])


@njit(forceinline=True)
def _first_position(frame, row):  # type: ignore[no-untyped-def]
    """The first position that a row's first query token sees."""
    window = np.int64(ints(data(operand(frame, _WHERE)), 2)[1])
    first = _row_field(frame, _CONTEXT_LEN, row) - _row_field(frame, _QUERY_LEN, row)
    return max(first - window + 1, 0)


@njit(forceinline=True)
def _shape(frame):  # type: ignore[no-untyped-def]
    pool = operand(frame, _POOL)
    kv_heads = size(pool, 3)
    group = size(operand(frame, _Q), 1) // kv_heads
    of = kind(pool)
    numbers = cpu_parts.FLOAT32 if of == FLOAT32 else cpu_parts.BFLOAT16
    if of in (INT8, UINT8):
        numbers = cpu_parts.INT8 if of == INT8 else cpu_parts.FP8
    return KernelShape(size(pool, 5), size(pool, 4), group, itemsize(pool), kv_heads, numbers)


@njit(forceinline=True)
def _lse_at(frame, token, heads):  # type: ignore[no-untyped-def]
    """Where a token's log-sum-exp goes; 0 if it is not wanted."""
    return data(result(frame, 1)) + 4 * token * heads if num_results(frame) > 1 else 0


@njit(cache=True)
def _merge(D, parts, stats, count, heads, out, lse):  # type: ignore[no-untyped-def]
    """From `count` spans' sums, (D + 2) * heads numbers apart, to one row's output."""
    stride = heads * (D + 2)
    sums = floats(parts, count * stride)
    stats_of = floats(stats, (count - 1) * stride + 2 * heads)
    target = floats(out, heads * D)
    for head in range(heads):
        highest, total = MASKED, np.float32(0)
        for part in range(count):
            highest = max(highest, stats_of[part * stride + head])
        for part in range(count):
            at = part * stride + head
            total += np.float32(math.exp(stats_of[at] - highest)) * stats_of[at + heads]
        for part in range(count):
            weight = np.float32(math.exp(stats_of[part * stride + head] - highest)) / total
            for i in range(head * D, (head + 1) * D):
                fresh = weight * sums[part * stride + i]
                target[i] = fresh if part == 0 else target[i] + fresh
        if lse:
            floats(lse, heads)[head] = highest + np.float32(math.log(total))


@njit(forceinline=True)
def _seen(frame, row):  # type: ignore[no-untyped-def]
    """Context tokens of a row that its first query token sees, if it is its only one."""
    return _row_field(frame, _CONTEXT_LEN, row) - _first_position(frame, row)


@njit
def _decode_span(frame, rows):  # type: ignore[no-untyped-def]
    """Context tokens of an item of decode rows, whole blocks: longer ones the more there is."""
    total = 0
    for row in range(rows):
        if _row_field(frame, _QUERY_LEN, row) == 1:
            total += _seen(frame, row)
    return padded(max(int(total) // (DECODE_ITEMS * num_threads(frame)), 1), BLOCK)


@begins()
def begin(frame, place):  # type: ignore[no-untyped-def]
    """Count the items of every row; blank what no row owns.

    Leaves where spans' results go (0: nowhere), an item's span, and every row's first item.
    """
    shape = _shape(frame)
    D, tile = shape.head_dim, prefill_tile(shape)
    rows, tokens = size(operand(frame, _QUERY_LEN), 0), size(operand(frame, _Q), 0)
    heads = size(operand(frame, _Q), 1)
    memory = allocate(8 * (rows + 3))
    header, firsts = words(memory, 2), words(memory + 16, rows + 1)
    span = _decode_span(frame, rows)
    count, end, any_split = np.int64(0), np.int64(0), False
    for row in range(rows):
        firsts[row] = count
        query_len = _row_field(frame, _QUERY_LEN, row)
        if query_len == 1:
            seen = _seen(frame, row)
            any_split |= seen > span
            count += (seen + span - 1) // span
        else:
            count += (query_len + tile - 1) // tile * shape.kv_heads
        end = max(end, _row_field(frame, _QUERY_START, row) + query_len)
    firsts[rows] = count
    header[0] = allocate(count * 4 * heads * (D + 2)) if any_split else 0
    header[1] = span
    floats(data(result(frame, 0)), tokens * heads * D)[end * heads * D :] = np.float32(0)
    if num_results(frame) > 1:
        floats(data(result(frame, 1)), tokens * heads)[end * heads :] = np.float32(0)
    words(place, 1)[0] = memory
    return count


@njit(forceinline=True)
def do_item(frame, memory, item, score, add_values):  # type: ignore[no-untyped-def]
    """One item: find its row, and run the row's kernel.

    Args:
        frame, memory, item: as of a custom call.
        score, add_values: of `cpu_decode`, for the pool's numbers.
    """
    shape = _shape(frame)
    D, kv_heads = shape.head_dim, shape.kv_heads
    block = shape.page_size * D * shape.itemsize  # bytes of one head's K or V of a page
    rows = size(operand(frame, _QUERY_LEN), 0)
    header, firsts = words(memory, 2), words(memory + 16, rows + 1)
    row = np.int64(np.searchsorted(firsts, item, side="right")) - 1
    index, count = item - firsts[row], firsts[row + 1] - firsts[row]
    q, pool = operand(frame, _Q), operand(frame, _POOL)
    heads = size(q, 1)
    where, rules = ints(data(operand(frame, _WHERE)), 2), floats(data(operand(frame, _RULES)), 2)
    pages = data(pool) + np.int64(where[0]) * size(pool, 1) * 2 * kv_heads * block
    scales = 0
    if shape.itemsize == 1:
        scales = data(operand(frame, _SCALES))
        scales += np.int64(where[0]) * size(pool, 1) * 2 * kv_heads * shape.page_size * 4
    table = operand(frame, _PAGE_TABLE)
    page_row = data(table) + 4 * row * size(table, 1)
    token = _row_field(frame, _QUERY_START, row)
    query_len = _row_field(frame, _QUERY_LEN, row)
    end = _row_field(frame, _CONTEXT_LEN, row)
    outs = data(result(frame, 0))
    if query_len == 1:
        scratch = allocate(decode_scratch(shape) + 8 * heads)
        out, stats = outs + 4 * token * heads * D, scratch + decode_scratch(shape)
        if count > 1:
            out = header[0] + item * 4 * heads * (D + 2)
            stats = out + 4 * heads * D
        start = _first_position(frame, row) + index * header[1]
        decode(
            score, add_values, shape, data(q) + 4 * token * heads * D, pages, scales, page_row,
            start, min(start + header[1], end), rules[0], rules[1], out, stats, scratch,
        )  # fmt: skip
        if count == 1:
            _merge(D, out, stats, 1, heads, out, _lse_at(frame, token, heads))
    else:
        scratch = allocate(prefill_scratch(shape))
        first, head = index // kv_heads * prefill_tile(shape), index % kv_heads
        token += first
        prefill(
            shape, data(q) + 4 * token * heads * D, min(prefill_tile(shape), query_len - first),
            end - query_len + first, pages, scales, page_row, np.int64(where[1]), head,
            rules[0], rules[1], outs + 4 * token * heads * D,
            _lse_at(frame, token, heads), scratch,
        )  # fmt: skip
    release(scratch)
    return 0


@ends()
def end(frame, memory):  # type: ignore[no-untyped-def]
    """Join what the spans of long decode rows came to."""
    D, heads = size(operand(frame, _POOL), 5), size(operand(frame, _Q), 1)
    rows = size(operand(frame, _QUERY_LEN), 0)
    parts_at, firsts = words(memory, 1)[0], words(memory + 16, rows + 1)
    if not parts_at:
        return 0
    for row in range(rows):
        count = firsts[row + 1] - firsts[row]
        if count > 1 and _row_field(frame, _QUERY_LEN, row) == 1:
            token = _row_field(frame, _QUERY_START, row)
            parts = parts_at + firsts[row] * 4 * heads * (D + 2)
            out = data(result(frame, 0)) + 4 * token * heads * D
            stats = parts + 4 * heads * D
            _merge(D, parts, stats, count, heads, out, _lse_at(frame, token, heads))
    release(parts_at)
    return 0
