"""What decode rows and prefill tiles have in common on a CPU, in Numba: see `cpu`.

Arrays are addresses of raw memory, and `floats` and the like make arrays of them.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from numba import njit

from pallas_kernels.cpu_calls.memory import floats, halves, octets
from pallas_kernels.cpu_calls.tiles import LANES, padded

MASKED = np.float32(-1e30)  # finite: a row with nothing to see must not turn into NaN
# Sums may be taken in any order; neither infinities nor NaN are to be told apart from numbers.
FAST = {"reassoc", "contract", "arcp", "nsz", "nnan", "ninf"}
OPTIONS = {"fastmath": FAST, "error_model": "numpy", "boundscheck": False}
compiled = functools.partial(njit, cache=True, **OPTIONS)
inlined = functools.partial(njit, forceinline=True, **OPTIONS)

# How the pool's numbers lie in memory.
FLOAT32, BFLOAT16, INT8, FP8 = range(4)
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
        itemsize: bytes of the pool's numbers.
        kv_heads: KV heads.
        kind: FLOAT32, BFLOAT16, or INT8 or FP8, which have scales.
    """

    head_dim: int
    page_size: int
    group: int
    itemsize: int
    kv_heads: int
    kind: int


# Loops below count from 0 over a slice: where an index could be negative, for all that LLVM knows,
# Numba's support for those keeps it from being vectorised.


@inlined()
def fill(array, value):  # type: ignore[no-untyped-def]
    """array[:] = value, without what Numba makes of that."""
    for i in range(array.shape[0]):
        array[i] = value


@inlined()
def multiply(array, factor):  # type: ignore[no-untyped-def]
    """array *= factor."""
    for i in range(array.shape[0]):
        array[i] *= factor


@inlined()
def _number_of_fp8(code):  # type: ignore[no-untyped-def]
    """float32 of a float8_e4m3fn's bits, an int8.

    Without float32's subnormal numbers, which XLA's threads take for zero: those with an
    exponent of 0 are read as if it was 1, which is 1/64 too much.
    """
    bits = np.int32(code) & np.int32(0x7F)
    small = bits < np.int32(8)
    wide = (bits << np.int32(20)) + (np.int32(121 << 23) if small else np.int32(120 << 23))
    less = np.float32(1 / 64) if small else np.float32(0)
    number = np.int32(wide).view(np.float32) - less
    return -number if code < 0 else number


@inlined()
def _widen_codes(target, source, width, kind, scale):  # type: ignore[no-untyped-def]
    """A row of codes of a kind becomes float32."""
    wide, codes = floats(target, width), octets(source, width)
    if kind == INT8:
        for i in range(width):
            wide[i] = np.float32(codes[i]) * scale
    else:
        for i in range(width):
            wide[i] = _number_of_fp8(codes[i]) * scale


@compiled()  # not inlined, as it is called for pages: inlined, it takes seconds to compile
def _copy_rows(shape, target, stride, source, scales, count):  # type: ignore[no-untyped-def]
    """`count` rows of the pool become float32 rows, `stride` apart."""
    width = shape.head_dim
    for row in range(count):
        wide = floats(target + 4 * row * stride, stride)
        if shape.kind == BFLOAT16:
            bits = wide.view(np.uint32)
            narrow = halves(source + 2 * row * width, width)
            for i in range(width):
                bits[i] = np.uint32(narrow[i]) << np.uint32(16)
        elif shape.kind == FLOAT32:
            given = floats(source + 4 * row * width, width)
            for i in range(width):
                wide[i] = given[i]
        else:
            scale = floats(scales + 4 * row, 1)[0] if scales else np.float32(1)
            _widen_codes(target + 4 * row * stride, source + row * width, width, shape.kind, scale)
        fill(wide[width:], np.float32(0))


@inlined()
def float_rows(shape, source, scales, count, wide):  # type: ignore[no-untyped-def]
    """Where `count` rows of the pool are float32, padded to whole vectors: at `source`, or copied.

    Args:
        shape: see `KernelShape`.
        source: their address in the pool.
        scales: address of their scales, which the copy is multiplied by; 0: there are none, or
            they are applied elsewhere.
        wide: where a copy goes, `padded(head_dim, LANES)` numbers from row to row.
    """
    D, stride = shape.head_dim, padded(shape.head_dim, LANES)
    rows = source
    if shape.kind != FLOAT32 or stride != D:
        rows = wide
        _copy_rows(shape, rows, stride, source, scales, count)
    return rows


@inlined()
def softmax_step(scores, soft_cap, highest, total, row):  # type: ignore[no-untyped-def]
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
