"""What one thread of a CPU computes of paged attention, in Numba: see `cpu`.

Arrays are addresses of raw memory. KV is read where it lies, once, for all query heads of a group:
a decode row is bound by that, so while one block of a page is worked on the next is fetched. A tile
of prefill queries is bound by arithmetic instead: two small matrix products per page, kept in
registers (`cpu_calls.tiles`).
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from numba import njit

from pallas_kernels.cpu_calls.memory import floats, halves, ints, prefetch
from pallas_kernels.cpu_calls.tiles import LANES, ROWS, dot_rows, multiply_add, padded

LINE = 64  # bytes of a cache line
MASKED = np.float32(-1e30)  # finite: a row with nothing to see must not turn into NaN
PREFILL_ROWS = 96  # query heads of a prefill tile: its tokens times the heads of a group
# Sums may be taken in any order; neither infinities nor NaN are to be told apart from numbers.
FAST = {"reassoc", "contract", "arcp", "nsz", "nnan", "ninf"}
_compiled = functools.partial(
    njit, fastmath=FAST, error_model="numpy", boundscheck=False, cache=True
)
_inlined = functools.partial(
    njit, fastmath=FAST, error_model="numpy", boundscheck=False, forceinline=True
)

LOG2_E = np.float32(math.log2(math.e))
# 2**x for 0 <= x < 1, a polynomial by powers of x from 0 on: 2e-7 off at most.
_POWERS = np.polynomial.Chebyshev.interpolate(np.exp2, 6, domain=[0, 1]).convert(
    kind=np.polynomial.Polynomial
)
_P0, _P1, _P2, _P3, _P4, _P5, _P6 = (np.float32(c) for c in _POWERS.coef)


class KernelShape(NamedTuple):
    """What all kernels must know.

    Attributes:
        head_dim, page_size: as in the pool.
        group: query heads per KV head.
        itemsize: bytes of the pool's numbers: 4 for float32, 2 for bfloat16.
        kv_heads: KV heads.
    """

    head_dim: int
    page_size: int
    group: int
    itemsize: int
    kv_heads: int


# Loops below count from 0 over a slice: where an index could be negative, for all that LLVM knows,
# Numba's support for those keeps it from being vectorised.


@_inlined()
def _fill(array, value):  # type: ignore[no-untyped-def]
    """array[:] = value, without what Numba makes of that."""
    for i in range(array.shape[0]):
        array[i] = value


@_inlined()
def _multiply(array, factor):  # type: ignore[no-untyped-def]
    """array *= factor."""
    for i in range(array.shape[0]):
        array[i] *= factor


@_inlined()
def _copy_rows(target, stride, source, width, size, count):  # type: ignore[no-untyped-def]
    """`count` rows of `width` numbers of the pool become float32 rows, `stride` apart."""
    for row in range(count):
        wide = floats(target + 4 * row * stride, stride)
        if size == 2:
            bits = wide.view(np.uint32)
            narrow = halves(source + 2 * row * width, width)
            for i in range(width):
                bits[i] = np.uint32(narrow[i]) << np.uint32(16)
        else:
            given = floats(source + 4 * row * width, width)
            for i in range(width):
                wide[i] = given[i]
        _fill(wide[width:], np.float32(0))


@_inlined()
def _transpose(keys, slots, source, width, size, low, high):  # type: ignore[no-untyped-def]
    """keys [width, slots][:, low:high] are the rows of the pool at `source`; zeros elsewhere."""
    if low > 0 or high < slots:
        _fill(keys, np.float32(0))
    for slot in range(high - low):
        column = keys[low + slot :]
        if size == 2:
            bits, narrow = column.view(np.uint32), halves(source + 2 * slot * width, width)
            for d in range(width):
                bits[d * slots] = np.uint32(narrow[d]) << np.uint32(16)
        else:
            given = floats(source + 4 * slot * width, width)
            for d in range(width):
                column[d * slots] = given[d]


@_inlined()
def _softmax_step(scores, soft_cap, highest, total, row):  # type: ignore[no-untyped-def]
    """One turn of the online softmax: scores become weights.

    Args:
        scores: float32, scaled.
        soft_cap: bound on scores, 0 for none.
        highest, total: the running maximum and sum of every row.
        row: which of them to use.

    Returns:
        What all that was summed up so far is to be multiplied by.
    """
    if soft_cap > 0:
        for i in range(scores.shape[0]):
            scores[i] = soft_cap * np.float32(math.tanh(scores[i] / soft_cap))
    new = highest[row]
    for i in range(scores.shape[0]):
        new = max(new, scores[i])
    fade = np.float32(math.exp(highest[row] - new))
    highest[row] = new
    added = np.float32(0)
    for i in range(scores.shape[0]):
        power = max((scores[i] - new) * LOG2_E, np.float32(-126))
        whole = np.floor(power)
        x = power - whole
        y = _P6 * x + _P5
        y = y * x + _P4
        y = y * x + _P3
        y = y * x + _P2
        y = y * x + _P1
        y = y * x + _P0
        exponent = (np.int32(whole) + np.int32(127)) << np.int32(23)
        y *= np.int32(exponent).view(np.float32)
        scores[i] = y
        added += y
    total[row] = total[row] * fade + added
    return fade


@_inlined()
def _fetch(start, size):  # type: ignore[no-untyped-def]
    """Ask for memory that is needed soon."""
    for byte in range(0, size, LINE):
        prefetch(start + byte)


@_inlined()
def prefill_tile(shape):  # type: ignore[no-untyped-def]
    """Query tokens of a tile."""
    return max(PREFILL_ROWS // shape.group, 1)


@_inlined()
def decode_scratch(shape):  # type: ignore[no-untyped-def]
    """Bytes that `decode` works in."""
    D, P, G, _, kv_heads = shape
    rows = padded(G, ROWS)
    return 4 * (rows * P + 2 * (kv_heads * rows + P) * padded(D, LANES))


@_inlined()
def prefill_scratch(shape):  # type: ignore[no-untyped-def]
    """Bytes that `prefill` works in."""
    D, P, G, _, _ = shape
    rows, wide, slots = padded(prefill_tile(shape) * G, ROWS), padded(D, LANES), padded(P, LANES)
    return 4 * (rows * (D + wide + slots + 2) + D * slots + P * wide)


@_compiled()
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
    D, P, G, size, kv_heads = shape
    heads, rows, stride = kv_heads * G, padded(G, ROWS), padded(D, LANES)
    head_bytes = P * D * size  # of one head's K or V of a page
    page_bytes = 2 * kv_heads * head_bytes
    in_place = size == 4 and stride == D
    given, outs = floats(q, heads * D), floats(out, heads * D)
    highest, total = floats(stats, heads), floats(stats + 4 * heads, heads)
    weights, sums_at = floats(scratch, rows * P), scratch + 4 * rows * P
    sums = floats(sums_at, kv_heads * rows * stride)
    queries_at = sums_at + 4 * kv_heads * rows * stride
    queries = floats(queries_at, kv_heads * rows * stride)
    k_wide_at = queries_at + 4 * kv_heads * rows * stride
    v_wide_at = k_wide_at + 4 * P * stride
    highest[:], total[:] = MASKED, np.float32(0)
    sums[:], weights[:], queries[:] = np.float32(0), np.float32(0), np.float32(0)
    for head in range(heads):
        at = (head // G * rows + head % G) * stride
        for d in range(D):
            queries[at + d] = given[head * D + d] * scale
    first, last = start // P, (end + P - 1) // P
    pages = ints(table, last)
    for page in range(first, last):
        low, high = max(start - page * P, 0), min(end - page * P, P)
        count = high - low
        base = pool + np.int64(pages[page]) * page_bytes
        next_base = pool + np.int64(pages[min(page + 1, last - 1)]) * page_bytes
        for h in range(kv_heads):
            k_at = base + h * head_bytes + low * D * size
            v_at = k_at + kv_heads * head_bytes
            k, v = k_at, v_at
            if not in_place:
                k, v = k_wide_at, v_wide_at
                _copy_rows(k, stride, k_at, D, size, count)
                _copy_rows(v, stride, v_at, D, size, count)
            first_row = h * rows * stride
            ahead = k_at + head_bytes if h + 1 < kv_heads else next_base
            dot_rows(scratch, P, queries_at + 4 * first_row, stride, k, stride, rows, count, stride)
            share = count * D * size // G
            for g in range(G):
                mine = weights[g * P : g * P + count]
                _fetch(ahead + g * share, share)
                _fetch(ahead + kv_heads * head_bytes + g * share, share)
                fade = _softmax_step(mine, soft_cap, highest, total, h * G + g)
                at = first_row + g * stride
                _multiply(sums[at : at + D], fade)
            multiply_add(
                sums_at + 4 * first_row, stride, scratch, P, v, stride, rows, count, stride
            )
    for head in range(heads):
        at = (head // G * rows + head % G) * stride
        outs[head * D : (head + 1) * D] = sums[at : at + D]


@_compiled()
def prefill(  # type: ignore[no-untyped-def]
    shape, q, count, position, pool, table, window, head, scale, soft_cap, out, lse, scratch
):
    """Attention of a tile of query tokens that follow each other, the heads of one KV head.

    Args:
        shape: see `KernelShape`.
        q: float32 [tokens, heads, head_dim], from the tile's first token on.
        count: its tokens, at most `prefill_tile(shape)`.
        position: of the first one.
        pool, table, scale, soft_cap: as in `decode`.
        window: positions that a token sees, its own included.
        head: the KV head.
        out: written: float32 [tokens, heads, head_dim], from the tile's first token on.
        lse: written: float32 [tokens, heads], likewise; 0: not wanted.
        scratch: `prefill_scratch(shape)` bytes to work in.
    """
    D, P, G, size, kv_heads = shape
    heads, end, used = kv_heads * G, position + count, count * G
    rows, stride, slots = padded(used, ROWS), padded(D, LANES), padded(P, LANES)
    queries, sums_at = floats(scratch, rows * D), scratch + 4 * rows * D
    sums, scores_at = floats(sums_at, rows * stride), sums_at + 4 * rows * stride
    scores, highest_at = floats(scores_at, rows * slots), scores_at + 4 * rows * slots
    highest, total = floats(highest_at, rows), floats(highest_at + 4 * rows, rows)
    keys_at = highest_at + 8 * rows
    wide_at = keys_at + 4 * D * slots
    sums[:], highest[:], total[:] = np.float32(0), MASKED, np.float32(0)
    queries[used * D :] = np.float32(0)
    for token in range(count):
        source = floats(q + 4 * (token * heads + head * G) * D, G * D)
        target = queries[token * G * D : (token + 1) * G * D]
        for i in range(G * D):
            target[i] = source[i] * scale

    first, last = max(position - window + 1, 0) // P, (end + P - 1) // P
    pages = ints(table, last)
    for page in range(first, last):
        low, high = max(position - window + 1 - page * P, 0), min(end - page * P, P)
        k_at = pool + (np.int64(pages[page]) * 2 * kv_heads + head) * P * D * size + low * D * size
        v_at = k_at + kv_heads * P * D * size
        _transpose(floats(keys_at, D * slots), slots, k_at, D, size, low, high)
        _fill(scores, np.float32(0))
        multiply_add(scores_at, slots, scratch, D, keys_at, slots, rows, D, slots)
        for row in range(used):
            own = position + row // G - page * P  # the token's slot, were it in this page
            begin, until = max(own - window + 1, 0), min(own + 1, P)
            mine = scores[row * slots : (row + 1) * slots]
            if begin < until:
                fade = _softmax_step(mine[begin:until], soft_cap, highest, total, row)
                _multiply(sums[row * stride : row * stride + D], fade)
            else:
                begin = until = P
            _fill(mine[:begin], np.float32(0))
            _fill(mine[until:], np.float32(0))
        v = v_at
        if size == 2 or stride != D:
            v = wide_at
            _copy_rows(v, stride, v_at, D, size, high - low)
        multiply_add(
            sums_at, stride, scores_at + 4 * low, slots, v, stride, rows, high - low, stride
        )

    for row in range(used):
        at = (row // G) * heads + head * G + row % G
        target, mine = floats(out + 4 * at * D, D), sums[row * stride : row * stride + D]
        share = np.float32(1) / total[row]
        for d in range(D):
            target[d] = mine[d] * share
        if lse:
            floats(lse + 4 * at, 1)[0] = highest[row] + np.float32(math.log(total[row]))
