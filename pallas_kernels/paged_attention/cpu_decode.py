"""Attention of decode rows on a CPU, in Numba: bound by reading KV, each number of it once.

KV is read where it lies, for all query heads of a group, in the order in which it lies: all keys of
a few pages first, then, once their scores are weights, all values. bfloat16 becomes float32 in
registers; only where rows are no multiple of a vector are they copied.
"""

import numpy as np

from pallas_kernels.cpu_calls.memory import floats, ints
from pallas_kernels.cpu_calls.products import make_dots, make_sums
from pallas_kernels.cpu_calls.tiles import LANES, padded
from pallas_kernels.paged_attention.cpu_parts import (
    MASKED,
    compiled,
    fill,
    float_rows,
    inlined,
    multiply,
    softmax_step,
)

BLOCK = 256  # context tokens whose scores are made before any of their values are read
AHEAD = 6144  # bytes from what is multiplied to what is fetched meanwhile, most often soon needed
_dots, _dots_narrow = make_dots(is_narrow=False), make_dots(is_narrow=True)
_sums, _sums_narrow = make_sums(is_narrow=False), make_sums(is_narrow=True)


@inlined()
def _block_tokens(shape):  # type: ignore[no-untyped-def]
    """Tokens of a block: whole pages."""
    return padded(BLOCK, shape.page_size)


@inlined()
def _is_split(shape):  # type: ignore[no-untyped-def]
    """Whether queries and sums lie as bfloat16 is widened: see `cpu_calls.tiles`."""
    return shape.itemsize == 2 and shape.head_dim % (2 * LANES) == 0


@inlined()
def decode_scratch(shape):  # type: ignore[no-untyped-def]
    """Bytes that `decode` works in."""
    heads, stride = shape.kv_heads * shape.group, padded(shape.head_dim, LANES)
    return 4 * (heads * (_block_tokens(shape) + 2 * stride) + shape.page_size * stride)


@inlined()
def _take_queries(shape, q, scale, queries):  # type: ignore[no-untyped-def]
    """Scaled queries, as `_score` takes them."""
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
    """What `_add_values` came to, as rows."""
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
def _score(shape, scores, queries, keys, count, wide):  # type: ignore[no-untyped-def]
    """scores [group, block][:, :count] of one head's `count` keys in a page."""
    D, G, block = shape.head_dim, shape.group, _block_tokens(shape)
    stride, ahead = padded(D, LANES), keys + AHEAD
    if _is_split(shape):
        _dots_narrow(scores, block, queries, stride, keys, D, G, count, D // (2 * LANES), ahead)
    else:
        rows = float_rows(shape, keys, count, wide)
        _dots(scores, block, queries, stride, rows, stride, G, count, stride // LANES, ahead)


@inlined()
def _add_values(shape, weights, sums, values, count, wide):  # type: ignore[no-untyped-def]
    """sums [group, head_dim] += weights [group, block][:, :count] @ a head's values in a page."""
    D, G, block = shape.head_dim, shape.group, _block_tokens(shape)
    stride, ahead = padded(D, LANES), values + AHEAD
    if _is_split(shape):
        _sums_narrow(sums, stride, weights, block, values, D, G, D, count, ahead)
    else:
        rows = float_rows(shape, values, count, wide)
        _sums(sums, stride, weights, block, rows, stride, G, stride, count, ahead)


@inlined()
def _each_piece(work, shape, pool, pages, half, begin, until, scores, rows, wide):  # type: ignore[no-untyped-def]
    """`_score` or `_add_values` of positions begin..until-1: by page, and by head in it.

    Args:
        work: which of them.
        shape, pool: as of `decode`.
        pages: the row's page numbers.
        half: of a page: 0, its keys; 1, its values.
        scores: address of float32 [heads, block], from position `begin` on.
        rows: of queries or sums, float32 [heads, stride].
        wide: see `float_rows`.
    """
    D, P, G, size, kv_heads = shape
    stride, block, head_bytes = padded(D, LANES), _block_tokens(shape), P * D * size
    for page in range(begin // P, (until + P - 1) // P):
        low, high = max(begin - page * P, 0), min(until - page * P, P)
        column = page * P + low - begin
        at = pool + (np.int64(pages[page]) * 2 + half) * kv_heads * head_bytes + low * D * size
        for h in range(kv_heads):
            own, mine = scores + 4 * (h * G * block + column), rows + 4 * h * G * stride
            work(shape, own, mine, at + h * head_bytes, high - low, wide)


@compiled()
def decode(  # type: ignore[no-untyped-def]
    shape, q, pool, table, start, end, scale, soft_cap, out, stats, scratch
):
    """Attention of one query token to a span of its context, all heads.

    Args:
        shape: see `KernelShape`.
        q: float32 [heads, head_dim].
        pool: one layer of it.
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
        _each_piece(_score, shape, pool, pages, 0, begin, until, scores_at, queries_at, wide)
        for head in range(heads):
            mine = scores[head * block : head * block + until - begin]
            fade = softmax_step(mine, soft_cap, highest, total, head)
            multiply(sums[head * stride : (head + 1) * stride], fade)
        _each_piece(_add_values, shape, pool, pages, 1, begin, until, scores_at, sums_at, wide)
    _give_sums(shape, sums_at, out)
