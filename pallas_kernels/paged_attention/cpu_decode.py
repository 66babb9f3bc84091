"""Attention of decode rows on a CPU, in Numba: bound by reading KV, each number of it once.

KV is read where it lies, for all query heads of a group, in the order in which it lies: all keys of
a few pages first, then, once their scores are weights, all values. Narrower numbers become float32
in registers; only where rows are no multiple of a vector are they copied. Of quantised KV codes are
what is multiplied: a key's scale goes into its scores, a value's into its weights.
"""

import numpy as np
from numba import njit

from pallas_kernels.cpu_calls.memory import floats, ints
from pallas_kernels.cpu_calls.products import make_dots, make_sums
from pallas_kernels.cpu_calls.tiles import FP8_SCALE, LANES, padded
from pallas_kernels.paged_attention.cpu_parts import (
    BFLOAT16,
    FP8,
    INT8,
    MASKED,
    OPTIONS,
    fill,
    float_rows,
    inlined,
    multiply,
    softmax_step,
)

BLOCK = 256  # context tokens whose scores are made before any of their values are read
AHEAD = 6144  # bytes from what is multiplied to what is fetched meanwhile, most often soon needed
_dots, _dots_bfloat16 = make_dots("float32"), make_dots("bfloat16")
_dots_int8, _dots_fp8 = make_dots("int8"), make_dots("fp8")
_sums, _sums_bfloat16 = make_sums("float32"), make_sums("bfloat16")
_sums_int8, _sums_fp8 = make_sums("int8"), make_sums("fp8")


@inlined()
def _block_tokens(shape):  # type: ignore[no-untyped-def]
    """Tokens of a block: whole pages."""
    return padded(BLOCK, shape.page_size)


@inlined()
def _is_split(shape):  # type: ignore[no-untyped-def]
    """Whether queries and sums lie as bfloat16 is widened: see `cpu_calls.tiles`."""
    return shape.kind == BFLOAT16 and shape.head_dim % (2 * LANES) == 0


@inlined()
def _has_codes(shape, kind):  # type: ignore[no-untyped-def]
    """Whether codes of a kind are widened in registers."""
    return shape.kind == kind and shape.head_dim % LANES == 0


@inlined()
def _apply_scales(shape, scores, scales, count):  # type: ignore[no-untyped-def]
    """Multiply scores or weights [group, block][:, :count] by their keys' or values' scales."""
    block = _block_tokens(shape)
    given = floats(scales, count)
    factor = np.float32(FP8_SCALE if _has_codes(shape, FP8) else 1)
    for g in range(shape.group):
        mine = floats(scores + 4 * g * block, count)
        for i in range(count):
            mine[i] *= given[i] * factor


@inlined()
def decode_scratch(shape):  # type: ignore[no-untyped-def]
    """Bytes that `decode` works in."""
    heads, stride = shape.kv_heads * shape.group, padded(shape.head_dim, LANES)
    return 4 * (heads * (_block_tokens(shape) + 2 * stride) + shape.page_size * stride)


@inlined()
def _take_queries(shape, q, scale, queries):  # type: ignore[no-untyped-def]
    """Scaled queries, as `score_floats` and `score_codes` take them."""
    D, heads = shape.head_dim, shape.kv_heads * shape.group
    stride = padded(D, LANES)
    for head in range(heads):
        given = floats(q + 4 * head * D, D)
        target = floats(queries + 4 * head * stride, stride)
        if _is_split(shape):
            for first in range(0, D, 2 * LANES):
                pairs, even, odd = given[first:], target[first:], target[first + LANES :]
                for i in range(LANES):
                    even[i], odd[i] = pairs[2 * i] * scale, pairs[2 * i + 1] * scale
        else:
            for d in range(D):
                target[d] = given[d] * scale
            fill(target[D:], np.float32(0))


@inlined()
def _give_sums(shape, sums, out):  # type: ignore[no-untyped-def]
    """What the sums of values came to, as rows."""
    D, heads = shape.head_dim, shape.kv_heads * shape.group
    stride = padded(D, LANES)
    for head in range(heads):
        given, target = floats(sums + 4 * head * stride, stride), floats(out + 4 * head * D, D)
        if _is_split(shape):
            for first in range(0, D, 2 * LANES):
                pairs, even, odd = target[first:], given[first:], given[first + LANES :]
                for i in range(LANES):
                    pairs[2 * i], pairs[2 * i + 1] = even[i], odd[i]
        else:
            for d in range(D):
                target[d] = given[d]


@inlined()
def score_floats(shape, scores, queries, keys, scales, count, wide):  # type: ignore[no-untyped-def]
    """scores [group, block][:, :count] of one head's `count` keys in a page."""
    D, G, block = shape.head_dim, shape.group, _block_tokens(shape)
    stride, ahead = padded(D, LANES), keys + AHEAD
    if _is_split(shape):
        _dots_bfloat16(scores, block, queries, stride, keys, D, G, count, D // (2 * LANES), ahead)
    else:
        rows = float_rows(shape, keys, 0, count, wide)
        _dots(scores, block, queries, stride, rows, stride, G, count, stride // LANES, ahead)


@inlined()
def score_codes(shape, scores, queries, keys, scales, count, wide):  # type: ignore[no-untyped-def]
    """`score_floats` of codes."""
    D, G, block = shape.head_dim, shape.group, _block_tokens(shape)
    stride, ahead = padded(D, LANES), keys + AHEAD
    if _has_codes(shape, INT8):
        _dots_int8(scores, block, queries, stride, keys, D, G, count, D // LANES, ahead)
    elif _has_codes(shape, FP8):
        _dots_fp8(scores, block, queries, stride, keys, D, G, count, D // LANES, ahead)
    else:
        rows = float_rows(shape, keys, 0, count, wide)
        _dots(scores, block, queries, stride, rows, stride, G, count, stride // LANES, ahead)
    _apply_scales(shape, scores, scales, count)


@inlined()
def add_floats(shape, weights, sums, values, scales, count, wide):  # type: ignore[no-untyped-def]
    """sums [group, head_dim] += weights [group, block][:, :count] @ a head's values in a page."""
    D, G, block = shape.head_dim, shape.group, _block_tokens(shape)
    stride, ahead = padded(D, LANES), values + AHEAD
    if _is_split(shape):
        _sums_bfloat16(sums, stride, weights, block, values, D, G, D, count, ahead)
    else:
        rows = float_rows(shape, values, 0, count, wide)
        _sums(sums, stride, weights, block, rows, stride, G, stride, count, ahead)


@inlined()
def add_codes(shape, weights, sums, values, scales, count, wide):  # type: ignore[no-untyped-def]
    """`add_floats` of codes."""
    D, G, block = shape.head_dim, shape.group, _block_tokens(shape)
    stride, ahead = padded(D, LANES), values + AHEAD
    _apply_scales(shape, weights, scales, count)
    if _has_codes(shape, INT8):
        _sums_int8(sums, stride, weights, block, values, D, G, D, count, ahead)
    elif _has_codes(shape, FP8):
        _sums_fp8(sums, stride, weights, block, values, D, G, D, count, ahead)
    else:
        rows = float_rows(shape, values, 0, count, wide)
        _sums(sums, stride, weights, block, rows, stride, G, stride, count, ahead)


@inlined()
def _each_piece(  # type: ignore[no-untyped-def]
    work, shape, pool, scales, pages, half, begin, until, scores, rows, wide
):
    """`score` or `add_values` of positions begin..until-1: by page, and by head in it.

    Args:
        work: which of them.
        shape, pool, scales: as of `decode`.
        pages: the row's page numbers.
        half: of a page: 0, its keys; 1, its values.
        scores: address of float32 [heads, block], from position `begin` on.
        rows: of queries or sums, float32 [heads, stride].
        wide: see `float_rows`.
    """
    D, P, G, size, kv_heads, _ = shape
    stride, block, head_bytes = padded(D, LANES), _block_tokens(shape), P * D * size
    for page in range(begin // P, (until + P - 1) // P):
        low, high = max(begin - page * P, 0), min(until - page * P, P)
        column = page * P + low - begin
        first_head = (np.int64(pages[page]) * 2 + half) * kv_heads
        at = pool + first_head * head_bytes + low * D * size
        for h in range(kv_heads):
            own, mine = scores + 4 * (h * G * block + column), rows + 4 * h * G * stride
            its_scales = scales + 4 * ((first_head + h) * P + low)
            work(shape, own, mine, at + h * head_bytes, its_scales, high - low, wide)


@njit(**OPTIONS)  # not kept by itself: functions that it is given have no lasting names
def decode(  # type: ignore[no-untyped-def]
    score, add_values, shape, q, pool, scales, table, start, end, scale, soft_cap, out, stats,
    scratch,
):  # fmt: skip
    """Attention of one query token to a span of its context, all heads.

    Args:
        score, add_values: `score_floats` and `add_floats`, or those of codes.
        shape: see `KernelShape`.
        q: float32 [heads, head_dim].
        pool: one layer of it.
        scales: of that layer, float32 [pages, 2, kv_heads, page_size]; 0 if there are none.
        table: the row's page numbers, int32.
        start, end: positions start..end-1 are seen.
        scale, soft_cap: of scores; 0 caps nothing.
        out: written: float32 [heads, head_dim], still to be divided by the sums of weights.
        stats: written: float32 [2, heads], the highest scores and those sums.
        scratch: `decode_scratch(shape)` bytes to work in.
    """
    P, heads = shape.page_size, shape.kv_heads * shape.group
    stride, block = padded(shape.head_dim, LANES), _block_tokens(shape)
    scores_at, sums_at = scratch, scratch + 4 * heads * block
    scores, sums = floats(scores_at, heads * block), floats(sums_at, heads * stride)
    queries_at = sums_at + 4 * heads * stride
    wide = queries_at + 4 * heads * stride
    highest, total = floats(stats, heads), floats(stats + 4 * heads, heads)
    highest[:], total[:] = MASKED, np.float32(0)
    sums[:] = np.float32(0)
    _take_queries(shape, q, scale, queries_at)

    last = (end + P - 1) // P
    pages = ints(table, last)
    for first in range(start // P, last, block // P):
        begin, until = max(start, first * P), min(end, first * P + block)
        _each_piece(score, shape, pool, scales, pages, 0, begin, until, scores_at, queries_at, wide)
        for head in range(heads):
            mine = scores[head * block : head * block + until - begin]
            fade = softmax_step(mine, soft_cap, highest, total, head)
            multiply(sums[head * stride : (head + 1) * stride], fade)
        _each_piece(
            add_values, shape, pool, scales, pages, 1, begin, until, scores_at, sums_at, wide
        )
    _give_sums(shape, sums_at, out)
