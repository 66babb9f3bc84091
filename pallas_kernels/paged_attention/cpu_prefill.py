"""Attention of prefill tiles on a CPU, in Numba: bound by arithmetic, not by reading KV.

Per page two small matrix products, kept in registers, with the page's keys transposed.
"""

import math

import numpy as np

from pallas_kernels.cpu_calls.memory import floats, halves, ints
from pallas_kernels.cpu_calls.products import ROWS, multiply_add
from pallas_kernels.cpu_calls.tiles import LANES, padded
from pallas_kernels.paged_attention.cpu_parts import (
    BFLOAT16,
    MASKED,
    compiled,
    fill,
    float_rows,
    inlined,
    multiply,
    softmax_step,
)

PREFILL_ROWS = 96  # query heads of a prefill tile: its tokens times the heads of a group


@inlined()
def _transpose(shape, keys, slots, source, scales, low, high, wide):  # type: ignore[no-untyped-def]
    """keys [head_dim, slots][:, low:high] are the rows of the pool at `source`; zeros elsewhere.

    Those of codes are widened at `wide` first.
    """
    width, stride = shape.head_dim, shape.head_dim
    if low > 0 or high < slots:
        fill(keys, np.float32(0))
    if shape.itemsize == 1:
        source = float_rows(shape, source, scales, high - low, wide)
        stride = padded(width, LANES)
    for slot in range(high - low):
        column = keys[low + slot :]
        if shape.kind == BFLOAT16:
            bits, narrow = column.view(np.uint32), halves(source + 2 * slot * width, width)
            for d in range(width):
                bits[d * slots] = np.uint32(narrow[d]) << np.uint32(16)
        else:
            given = floats(source + 4 * slot * stride, width)
            for d in range(width):
                column[d * slots] = given[d]


@inlined()
def prefill_tile(shape):  # type: ignore[no-untyped-def]
    """Query tokens of a tile."""
    return max(PREFILL_ROWS // shape.group, 1)


@inlined()
def prefill_scratch(shape):  # type: ignore[no-untyped-def]
    """Bytes that `prefill` works in."""
    D, P, G, _, _, _ = shape
    rows, wide, slots = padded(prefill_tile(shape) * G, ROWS), padded(D, LANES), padded(P, LANES)
    return 4 * (rows * (D + wide + slots + 2) + D * slots + P * wide)


@compiled()
def prefill(  # type: ignore[no-untyped-def]
    shape, q, count, position, pool, scales, table, window, head, scale, soft_cap, out, lse, scratch
):
    """Attention of a tile of query tokens that follow each other, the heads of one KV head.

    Args:
        shape: see `KernelShape`.
        q: float32 [tokens, heads, head_dim], from the tile's first token on.
        count: its tokens, at most `prefill_tile(shape)`.
        position: of the first one.
        pool, scales, table, scale, soft_cap: as in `decode`.
        window: positions that a token sees, its own included.
        head: the KV head.
        out: written: float32 [tokens, heads, head_dim], from the tile's first token on.
        lse: written: float32 [tokens, heads], likewise; 0: not wanted.
        scratch: `prefill_scratch(shape)` bytes to work in.
    """
    D, P, G, size, kv_heads, _ = shape
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
        first_slot = (np.int64(pages[page]) * 2 * kv_heads + head) * P + low
        k_at = pool + first_slot * D * size
        v_at = k_at + kv_heads * P * D * size
        k_scales = v_scales = scales
        if scales:
            k_scales = scales + 4 * first_slot
            v_scales = k_scales + 4 * kv_heads * P
        _transpose(shape, floats(keys_at, D * slots), slots, k_at, k_scales, low, high, wide_at)
        fill(scores, np.float32(0))
        multiply_add(scores_at, slots, scratch, D, keys_at, slots, rows, D, slots)
        for row in range(used):
            own = position + row // G - page * P  # the token's slot, were it in this page
            begin, until = max(own - window + 1, 0), min(own + 1, P)
            mine = scores[row * slots : (row + 1) * slots]
            if begin < until:
                fade = softmax_step(mine[begin:until], soft_cap, highest, total, row)
                multiply(sums[row * stride : row * stride + D], fade)
            else:
                begin = until = P
            fill(mine[:begin], np.float32(0))
            fill(mine[until:], np.float32(0))
        v = float_rows(shape, v_at, v_scales, high - low, wide_at)
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
