"""Rows of a quantised weight, made ready for tiles: for Numba, of the operands of one custom call.

A weight's scales and minimums become float32 as they are needed, a row at a time; where codes have
an offset and no minimum, `-offset * scale` is one.
"""

from typing import Any

from numba import float32, njit

from pallas_kernels.cpu_calls.codes import (
    BLOCK,
    HALF,
    WIDENED,
    make_byte_block,
    make_float_block,
    make_four_blocks,
    make_lane_scales,
    spread_floats,
    widen_bfloat16,
    widen_bfloat16s,
    widen_float16,
    widen_float16s,
)
from pallas_kernels.cpu_calls.handler import BFLOAT16, FLOAT16, INT8, kind, size
from pallas_kernels.cpu_calls.integer_tiles import (
    FOURTH,
    SEGMENT,
    best_instructions,
    is_unsigned,
    segment_bytes,
)
from pallas_kernels.cpu_calls.memory import clear, copy, floats
from pallas_kernels.cpu_calls.tiles import FP8_SCALE, padded

FP8 = 9  # what `code_kind` says of float8: others are their codes' bits
BLOCK_BYTES = 32  # at most
_IS_UNSIGNED = is_unsigned(best_instructions()[0])
_BIAS = 128  # of int8 where codes are taken as unsigned
_spread_four = spread_floats(FOURTH // 4)
_lane_scales, _lane_scales_of_halves = make_lane_scales(1), make_lane_scales(2)
SPARE_SCALES = 8


@njit(forceinline=True)
def code_kind(values, width):  # type: ignore[no-untyped-def]
    """Bits of a weight's codes, or FP8."""
    bits = 8 * size(values, 1) // width
    return bits if bits < 8 or kind(values) == INT8 else FP8


@njit
def read_scales(target, source, number_kind, count):  # type: ignore[no-untyped-def]
    """The float32 at target of the `count` scales, of any type, at source."""
    whole = count // WIDENED * WIDENED
    if number_kind == FLOAT16:
        for i in range(0, whole, WIDENED):
            widen_float16s(target + 4 * i, source + 2 * i)
        for i in range(whole, count):
            widen_float16(target + 4 * i, source + 2 * i)
    elif number_kind == BFLOAT16:
        for i in range(0, whole, WIDENED):
            widen_bfloat16s(target + 4 * i, source + 2 * i)
        for i in range(whole, count):
            widen_bfloat16(target + 4 * i, source + 2 * i)
    else:
        copy(target, source, 4 * count)


@njit
def take_off(minimums, scales, offset, count):  # type: ignore[no-untyped-def]
    """Lowers the minimums at an address by what an offset of codes comes to."""
    out, factors = floats(minimums, count), floats(scales, count)
    for i in range(count):
        out[i] -= float32(offset) * factors[i]


@njit(forceinline=True)
def scale_bytes(number_kind):  # type: ignore[no-untyped-def]
    """Bytes of a scale."""
    return 2 if number_kind in (FLOAT16, BFLOAT16) else 4


@njit(forceinline=True)
def _last_block(spare, values, count):  # type: ignore[no-untyped-def]
    """The address of the `count` bytes at values, with zeros behind them."""
    clear(spare, BLOCK)
    copy(spare, values, count)
    return spare


def _make_float_row(codes: str) -> Any:
    """A row of a weight as float32.

    Returns:
        For Numba: (target, values, scales, minimums, width, group, spare), addresses and sizes;
        what is written is a multiple of BLOCK. `spare` is of BLOCK_BYTES.
    """
    block = make_float_block(codes)
    pitch = {"int4": 16, "int5": 20, "int6": 24}.get(codes, 32)

    @njit
    def row(target, values, scales, minimums, width, group, spare):  # type: ignore[no-untyped-def]
        groups = (width - 1) // group + 1
        s, m = floats(scales, groups), floats(minimums, groups)
        whole = width // BLOCK
        if group % BLOCK and group < width:
            for at in range(whole):
                i, j = at * BLOCK // group, (at * BLOCK + HALF) // group
                block(target, values, s[i], m[i], s[j], m[j])
                target += 4 * BLOCK
                values += pitch
        else:
            at = 0
            for g in range(groups):
                stop = min(at + (group - 1) // BLOCK + 1, whole)
                scale, minimum = s[g], m[g]
                while at < stop:
                    block(target, values, scale, minimum, scale, minimum)
                    target += 4 * BLOCK
                    values += pitch
                    at += 1
        if whole * BLOCK < width:
            last = _last_block(spare, values, width - whole * BLOCK)
            i = groups - 1
            block(target, last, s[i], m[i], s[i], m[i])

    return row


_float_4, _float_5, _float_6, _float_8, _float_fp8 = (
    _make_float_row(codes) for codes in ("int4", "int5", "int6", "int8", "fp8")
)


@njit
def float_row(codes, target, values, scales, minimums, width, group, spare):  # type: ignore[no-untyped-def]
    """A row of any codes (see `_make_float_row`)."""
    if codes == 4:
        _float_4(target, values, scales, minimums, width, group, spare)
    elif codes == 5:
        _float_5(target, values, scales, minimums, width, group, spare)
    elif codes == 6:
        _float_6(target, values, scales, minimums, width, group, spare)
    elif codes == 8:
        _float_8(target, values, scales, minimums, width, group, spare)
    else:
        _float_fp8(target, values, scales, minimums, width, group, spare)


@njit
def scale_up(scales, count):  # type: ignore[no-untyped-def]
    """FP8_SCALE times the numbers at an address."""
    factors = floats(scales, count)
    for i in range(count):
        factors[i] *= float32(FP8_SCALE)


@njit(forceinline=True)
def offset_of(codes, has_minimums, is_float):  # type: ignore[no-untyped-def]
    """What is to be taken off a code as the tiles have it, by way of the minimums."""
    if is_float or _IS_UNSIGNED:
        bias = _BIAS if codes == 8 and not is_float else 0
        own = 0 if has_minimums or codes >= 8 else 1 << (codes - 1)
        return bias + own
    return 0


def _make_byte_row(codes: str, subtracts: int = 0) -> Any:
    """A row of a weight in an integer tile's segments, without scales.

    Returns:
        For Numba: (target, values, width, size, spare); `size` is a segment's bytes.
    """
    block = make_byte_block(codes, subtracts=subtracts, flips=_IS_UNSIGNED and codes == "int8")
    pitch = {"int4": 16, "int5": 20, "int6": 24}.get(codes, 32)
    half = SEGMENT // 2

    segment_at_once = make_four_blocks(subtracts=subtracts)

    @njit
    def row(target, values, width, size, spare):  # type: ignore[no-untyped-def]
        whole, in_segment, at = width // BLOCK, SEGMENT // BLOCK, 0
        if pitch == HALF:
            while at + in_segment <= whole:
                segment_at_once(target, values, half)
                target += size
                values += in_segment * pitch
                at += in_segment
        while at < whole:
            place = target
            for _ in range(min(in_segment, whole - at)):
                block(place, values, half)
                place += FOURTH
                values += pitch
            target += size
            at += in_segment
        if whole * BLOCK < width:
            place = target if at == whole else target - size + whole % in_segment * FOURTH
            block(place, _last_block(spare, values, width - whole * BLOCK), half)

    return row


_bytes_8, _bytes_4, _bytes_5, _bytes_6 = (
    _make_byte_row(codes) for codes in ("int8", "int4", "int5", "int6")
)
# Where codes are taken as unsigned, what an offset comes to is left to the minimums.
_centred_4, _centred_5, _centred_6 = (
    same if _IS_UNSIGNED else _make_byte_row(f"int{bits}", 1 << (bits - 1))
    for bits, same in ((4, _bytes_4), (5, _bytes_5), (6, _bytes_6))
)


@njit
def byte_row(codes, has_minimums, target, values, width, size, spare):  # type: ignore[no-untyped-def]
    """A row of any integer codes (see `_make_byte_row`); what is added is `offset_of`."""
    if codes == 8:
        _bytes_8(target, values, width, size, spare)
    elif codes == 4 and has_minimums:
        _bytes_4(target, values, width, size, spare)
    elif codes == 4:
        _centred_4(target, values, width, size, spare)
    elif codes == 5 and has_minimums:
        _bytes_5(target, values, width, size, spare)
    elif codes == 5:
        _centred_5(target, values, width, size, spare)
    elif has_minimums:
        _bytes_6(target, values, width, size, spare)
    else:
        _centred_6(target, values, width, size, spare)


@njit
def spread_scales(target, scales, width, group, parts):  # type: ignore[no-untyped-def]
    """The scales of an integer tile's lanes, of the `parts` of each block, in its segments.

    Lanes without codes may get any number that lies behind, of SPARE_SCALES at most: what they are
    multiplied with is zero.
    """
    size = segment_bytes(parts)
    target += SEGMENT
    if group * parts == BLOCK:
        step = 4 * SEGMENT // group
        for _ in range(padded(width, SEGMENT) // SEGMENT):
            if parts == 1:
                _lane_scales(target, scales)
            else:
                _lane_scales_of_halves(target, scales)
            target += size
            scales += step
        return
    factors = floats(scales, (width - 1) // group + 1)
    step = BLOCK // parts
    at, left = 0, group  # the group, and what is left of it
    for block in range(padded(width, SEGMENT) // BLOCK):
        place = target + block // 4 * size + block % 4 * FOURTH
        for _ in range(parts):
            _spread_four(place, factors[at] if at < len(factors) else float32(0))
            place += 4 * FOURTH
            left -= step
            if left <= 0:
                at += 1
                left += group
