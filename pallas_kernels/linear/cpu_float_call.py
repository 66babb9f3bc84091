"""A custom call of `linear` on CPUs: activations as they are times quantised weights."""

from typing import Any

from numba import njit

from pallas_kernels.cpu_calls.codes import BLOCK
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
from pallas_kernels.cpu_calls.memory import allocate, clear, copy, release, words
from pallas_kernels.cpu_calls.tiles import LANES, LINE, dot_tile, padded
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
    FP8,
    code_kind,
    float_row,
    offset_of,
    scale_up,
    take_off,
)


@begins()
def _begin(frame, place):  # type: ignore[no-untyped-def]
    """Activations are taken as they lie, if their rows are whole vectors, or else copied."""
    x = operand(frame, X)
    width = size(x, 1)
    whole = padded(width, BLOCK)
    items = prepare_call(frame, place, 4 * whole if whole > width else 0)
    fields = words(words(place, 1)[0], 3)
    if whole == width:
        fields[X_AT] = data(x)
        return items
    for token in range(fields[TOKENS]):
        row = fields[X_AT] + 4 * token * whole
        copy(row, data(x) + 4 * token * width, 4 * width)
        clear(row + 4 * width, 4 * (whole - width))
    return items


def _make_float_tile(tokens: int) -> Any:
    tile = dot_tile(tokens, COLUMNS, fetches=False)

    @njit(inline="always")
    def multiply(out, out_stride, x, row, shape):  # type: ignore[no-untyped-def]
        width = shape[0] // 4
        tile(out, out_stride, x, width, row, width, width // LANES)

    return multiply


_multiply = make_multiply(_make_float_tile)


@does()
def _do(frame, memory, item):  # type: ignore[no-untyped-def]
    """One strip of the weight as float32, for all tokens."""
    values, fields = operand(frame, VALUES), words(memory, 3)
    width, bytes_of_row = size(operand(frame, X), 1), size(values, 1)
    outputs, tokens, x = size(values, 0), fields[TOKENS], fields[X_AT]
    groups, codes = size(operand(frame, SCALES), 1), code_kind(values, width)
    pitch = 4 * padded(width, BLOCK)
    offset = offset_of(codes, size(operand(frame, MINIMUMS), 0) > 0, True)
    first, last = span(frame, memory, item)
    at_once = COLUMNS if tokens <= MOST_TOKENS else MANY
    row_room, scale_room = at_once * pitch, 4 * at_once * groups
    beside = BLOCK_BYTES + 4 * COLUMNS * MOST_TOKENS
    room = allocate(LINE + row_room + 2 * scale_room + beside)
    rows = padded(room, LINE)
    scales = rows + row_room
    minimums, spare = scales + scale_room, scales + 2 * scale_room
    for at in range(first, last, at_once):
        count = min(at_once, last - at)
        read_rows(frame, at, scales, minimums, groups, count)
        if offset:
            take_off(minimums, scales, offset, count * groups)
        if codes == FP8:
            scale_up(scales, count * groups)
        for row in range(count):
            source = data(values) + (at + row) * bytes_of_row
            mine = 4 * row * groups
            float_row(
                codes, rows + row * pitch, source, scales + mine, minimums + mine, width,
                width // groups, spare,
            )  # fmt: skip
        out = data(result(frame, 0)) + 4 * at
        _multiply(out, outputs, x, tokens, rows, count, (pitch, 0, 0, 0), spare + BLOCK_BYTES)
    release(room)
    clear_rest(frame, tokens, first, last)
    return 0


@ends()
def _end(frame, memory):  # type: ignore[no-untyped-def]
    return 0


def make_call() -> Any:
    """The handler of the custom call whose operands and results `cpu.linear` names."""
    return make_handler(_begin, _do, _end)
