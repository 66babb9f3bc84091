"""A custom call of `linear` on CPUs: activations rounded to int8 times quantised weights."""

from typing import Any

from numba import float32, njit

from pallas_kernels.cpu_calls.codes import BLOCK, HALF
from pallas_kernels.cpu_calls.handler import (
    begins,
    data,
    does,
    ends,
    make_handler,
    operand,
    result,
    size,
)
from pallas_kernels.cpu_calls.integer_tiles import (
    FOURTH,
    SEGMENT,
    best_instructions,
    byte_dot_tile,
    segment_bytes,
)
from pallas_kernels.cpu_calls.memory import (
    allocate,
    clear,
    copy,
    floats,
    ints,
    octets,
    release,
    words,
)
from pallas_kernels.cpu_calls.tiles import LINE, padded
from pallas_kernels.linear.cpu_quantised import (
    COLUMNS,
    MANY,
    MINIMUMS,
    MOST_TOKENS,
    SCALES,
    TOKENS,
    VALUES,
    X_AT,
    X,
    clear_rest,
    make_multiply,
    prepare_call,
    read_rows,
    span,
)
from pallas_kernels.linear.cpu_rows import (
    BLOCK_BYTES,
    SPARE_SCALES,
    byte_row,
    code_kind,
    offset_of,
    spread_scales,
    take_off,
)

_INSTRUCTIONS, _LANES = best_instructions()
_LARGEST_CODE = 127
# Added to a float32, it leaves the nearest integer, ties to even, in the lowest bits.
_ROUNDER, _ROUNDER_BITS = 12582912.0, 0x4B400000


@njit(forceinline=True)
def _group_of(frame, width):  # type: ignore[no-untyped-def]
    return width // size(operand(frame, SCALES), 1)


@njit(forceinline=True)
def _parts_of(frame, width):  # type: ignore[no-untyped-def]
    """Parts of a block that have scales of their own."""
    group = _group_of(frame, width)
    return 2 if group % BLOCK and group < width else 1


@njit(forceinline=True)
def _sums_bytes(groups):  # type: ignore[no-untyped-def]
    """What a row's float32 for each group take: whole registers, with zeros behind."""
    return padded(4 * groups, LINE)


@njit(forceinline=True)
def _byte_pitch(width, groups, parts):  # type: ignore[no-untyped-def]
    """Bytes from row to row of segments, with a float32 for each group behind them."""
    return padded(width, SEGMENT) // SEGMENT * segment_bytes(parts) + _sums_bytes(groups)


@njit
def _round_row(target, sums, x, width, group, parts):  # type: ignore[no-untyped-def]
    """A token's activations in segments, with scales; at `sums` each group's sum."""
    codes_per_segment, groups = SEGMENT // 2, (width - 1) // group + 1
    whole = padded(width, SEGMENT)
    spare = allocate(4 * (2 * whole + groups + SPARE_SCALES))
    bits, scales = spare, floats(spare + 8 * whole, groups)
    rounded = spare + 4 * whole
    copy(bits, x, 4 * width)
    clear(bits + 4 * width, 4 * (whole - width))
    for g in range(groups):
        first, last = g * group, min((g + 1) * group, width)
        as_bits = ints(bits + 4 * first, last - first)
        largest = 0
        for i in range(last - first):
            largest = max(largest, as_bits[i] & 0x7FFFFFFF)  # floats are ordered as integers are
        ints(spare + 8 * whole + 4 * g, 1)[0] = largest
        top = scales[g]
        factor = float32(_LARGEST_CODE) / (top if top > float32(0) else float32(1))
        scales[g] = top * float32(1 / _LARGEST_CODE)
        mine, out = (
            floats(bits + 4 * first, last - first),
            floats(rounded + 4 * first, last - first),
        )
        for i in range(last - first):
            out[i] = mine[i] * factor + float32(_ROUNDER)
        codes, total = ints(rounded + 4 * first, last - first), 0
        for i in range(last - first):
            codes[i] -= _ROUNDER_BITS
            total += codes[i]
        floats(sums, groups)[g] = float32(total) * scales[g]
    clear(rounded + 4 * width, 4 * (whole - width))
    clear(spare + 8 * whole + 4 * groups, 4 * SPARE_SCALES)
    segment = segment_bytes(parts)
    for half in range(whole // HALF):
        block = half // 2
        place = target + block // 4 * segment + half % 2 * codes_per_segment + block % 4 * FOURTH
        codes, out = ints(rounded + 4 * HALF * half, HALF), octets(place, HALF)
        for i in range(HALF):
            out[i] = codes[i]
    spread_scales(target, spare + 8 * whole, width, group, parts)
    release(spare)


@begins()
def _begin(frame, place):  # type: ignore[no-untyped-def]
    """Rounds the activations, with the groups of the weight."""
    x = operand(frame, X)
    width = size(x, 1)
    group, parts = _group_of(frame, width), _parts_of(frame, width)
    groups = (width - 1) // group + 1
    pitch = _byte_pitch(width, groups, parts)
    items = prepare_call(frame, place, pitch)
    fields = words(words(place, 1)[0], 3)
    for token in range(fields[TOKENS]):
        target = fields[X_AT] + token * pitch
        sums = target + pitch - _sums_bytes(groups)
        clear(sums, _sums_bytes(groups))
        _round_row(target, sums, data(x) + 4 * token * width, width, group, parts)
    return items


def _make_byte_tile(tokens: int, parts: int) -> Any:
    tile = byte_dot_tile(tokens, COLUMNS, parts, _INSTRUCTIONS, _LANES)

    @njit(inline="always")
    def multiply(out, out_stride, x, row, shape):  # type: ignore[no-untyped-def]
        pitch, segments, to_sums, registers = shape
        tile(out, out_stride, x, pitch, x + to_sums, row, pitch, row + to_sums, segments, registers)

    return multiply


_multiply, _multiply_parts = (
    make_multiply(lambda tokens, parts=parts: _make_byte_tile(tokens, parts)) for parts in (1, 2)
)


@does()
def _do(frame, memory, item):  # type: ignore[no-untyped-def]
    """One strip of the weight as bytes, for all tokens."""
    values, fields = operand(frame, VALUES), words(memory, 3)
    width, bytes_of_row = size(operand(frame, X), 1), size(values, 1)
    outputs, tokens, x = size(values, 0), fields[TOKENS], fields[X_AT]
    groups, codes = size(operand(frame, SCALES), 1), code_kind(values, width)
    group, parts = width // groups, _parts_of(frame, width)
    pitch, segment = _byte_pitch(width, groups, parts), segment_bytes(parts)
    to_sums = pitch - _sums_bytes(groups)
    has_minimums = size(operand(frame, MINIMUMS), 0) > 0
    offset = offset_of(codes, has_minimums, False)
    shape = (pitch, to_sums // segment, to_sums, _sums_bytes(groups) // (4 * _LANES))
    first, last = span(frame, memory, item)
    at_once = COLUMNS if tokens <= MOST_TOKENS else MANY
    row_room, scale_room = at_once * pitch, 4 * (at_once * groups + SPARE_SCALES)
    beside = BLOCK_BYTES + 4 * COLUMNS * MOST_TOKENS
    room = allocate(LINE + row_room + 2 * scale_room + beside)
    rows = padded(room, LINE)
    clear(rows, row_room + scale_room)
    scales = rows + row_room
    minimums, spare = scales + scale_room, scales + 2 * scale_room
    for at in range(first, last, at_once):
        count = min(at_once, last - at)
        read_rows(frame, at, scales, minimums, groups, count)
        if offset:
            take_off(minimums, scales, offset, count * groups)
        for row in range(count):
            target, mine = rows + row * pitch, 4 * row * groups
            copy(target + to_sums, minimums + mine, 4 * groups)
            source = data(values) + (at + row) * bytes_of_row
            byte_row(codes, has_minimums, target, source, width, segment, spare)
            spread_scales(target, scales + mine, width, group, parts)
        out, tile_out = data(result(frame, 0)) + 4 * at, spare + BLOCK_BYTES
        if parts == 1:
            _multiply(out, outputs, x, tokens, rows, count, shape, tile_out)
        else:
            _multiply_parts(out, outputs, x, tokens, rows, count, shape, tile_out)
    release(room)
    clear_rest(frame, tokens, first, last)
    return 0


@ends()
def _end(frame, memory):  # type: ignore[no-untyped-def]
    return 0


def make_call() -> Any:
    """The handler of the custom call whose operands and results `cpu.linear` names."""
    return make_handler(_begin, _do, _end)
