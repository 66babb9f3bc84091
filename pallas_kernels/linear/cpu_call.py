"""One custom call of `linear` on CPUs: strips of the weight, and the tiles they fall into."""

from typing import Any

from numba import njit

from pallas_kernels.cpu_calls.handler import (
    begins,
    data,
    does,
    ends,
    make_handler,
    num_threads,
    operand,
    result,
    size,
)
from pallas_kernels.cpu_calls.memory import allocate, clear, floats, ints, words
from pallas_kernels.cpu_calls.tiles import LANES, SUMS, dot_tile, padded, product_tile
from pallas_kernels.linear.cpu import COLUMNS_FROM

GROUP = 12  # rows of the weight that tiles come to a border at: a multiple of every tile's rows
STRIPS = 2  # items per thread: one that comes late leaves some to the others
L2_BYTES = 1 << 20  # what activations may take of a core's own cache
_X, _WEIGHT, _NUM_TOKENS = range(3)  # the call's operands


def _make_dots(rows: int) -> Any:
    """The strip for few tokens: `rows` of them at once, dot products along both operands' rows."""
    columns = min(SUMS // rows, 4)
    tile = dot_tile(rows, columns)
    one = dot_tile(rows, 1)

    @njit
    def strip(x, weight, out, tokens, width, outputs, first, last):  # type: ignore[no-untyped-def]
        whole = width // LANES
        at = first
        while at < last:
            count = columns if at + columns <= last else 1
            row = weight + 4 * at * width
            ahead = row + 4 * count * width
            for token in range(0, tokens, rows):
                start = min(token, tokens - rows)  # the last may repeat some of those before
                target, source = out + 4 * (start * outputs + at), x + 4 * start * width
                if count > 1:
                    tile(target, outputs, source, width, row, width, whole, ahead)
                else:
                    one(target, outputs, source, width, row, width, whole, ahead)
                if whole * LANES < width:
                    _add_rest(target, outputs, source, row, width, rows, count)
            at += count

    return strip


@njit
def _add_rest(out, outputs, x, weight, width, rows, columns):  # type: ignore[no-untyped-def]
    """What is left of the dot products where rows are no multiple of LANES."""
    done = width // LANES * LANES
    for row in range(rows):
        target = floats(out + 4 * row * outputs, columns)
        mine = floats(x + 4 * (row * width + done), width - done)
        for column in range(columns):
            other = floats(weight + 4 * (column * width + done), width - done)
            for i in range(width - done):
                target[column] += mine[i] * other[i]


def _make_products(vectors: int) -> Any:
    """The strip for `vectors * LANES` tokens at once, which lie next to one another."""
    rows = min(SUMS // vectors, GROUP)
    tile = product_tile(rows, vectors, adds=False, fetches="a")
    one = product_tile(1, vectors, adds=False, fetches="a")
    columns = vectors * LANES

    @njit
    def strip(x, weight, out, tokens, width, begin, end, first, last):  # type: ignore[no-untyped-def]
        """Rows first..last-1 of the weight, for tokens begin..end-1."""
        at = first
        while at < last:
            count = rows if at + rows <= last else 1
            row = weight + 4 * at * width
            ahead = row + 4 * count * width
            for token in range(begin, end, columns):
                start = min(token, tokens - columns)  # the last may repeat some of those before
                target, source = out + 4 * (at * tokens + start), x + 4 * start
                if count > 1:
                    tile(target, tokens, row, width, source, tokens, width, ahead)
                else:
                    one(target, tokens, row, width, source, tokens, width, ahead)
            at += count

    return strip


_dots_1, _dots_2, _dots_4, _dots_8 = (_make_dots(rows) for rows in (1, 2, 4, 8))
_products_1, _products_2, _products_4 = (_make_products(vectors) for vectors in (1, 2, 4))


@njit
def _few_tokens(x, weight, out, tokens, width, outputs, first, last):  # type: ignore[no-untyped-def]
    if tokens >= 8:
        _dots_8(x, weight, out, tokens, width, outputs, first, last)
    elif tokens >= 4:
        _dots_4(x, weight, out, tokens, width, outputs, first, last)
    elif tokens >= 2:
        _dots_2(x, weight, out, tokens, width, outputs, first, last)
    else:
        _dots_1(x, weight, out, tokens, width, outputs, first, last)


@njit
def _many_tokens(x, weight, out, tokens, num_tokens, width, first, last):  # type: ignore[no-untyped-def]
    """As many tokens at a time as their activations stay in the core's cache for all rows.

    There are `num_tokens` of them; columns are `tokens` numbers long.
    """
    block = padded(max(L2_BYTES // (4 * width), 1), 4 * LANES)
    for begin in range(0, num_tokens, block):
        end = min(begin + block, num_tokens)
        wide = begin + (end - begin) // (4 * LANES) * (4 * LANES)
        if wide > begin:
            _products_4(x, weight, out, tokens, width, begin, wide, first, last)
        if end - wide > LANES and tokens >= 2 * LANES:
            _products_2(x, weight, out, tokens, width, wide, end, first, last)
        elif end > wide:
            _products_1(x, weight, out, tokens, width, wide, end, first, last)


@njit
def _clear(out, tokens, num_tokens, outputs, first, last):  # type: ignore[no-untyped-def]
    """Zeros where tokens would be that there are not."""
    if tokens < COLUMNS_FROM:
        for token in range(num_tokens, tokens):
            clear(out + 4 * (token * outputs + first), 4 * (last - first))
    elif num_tokens < tokens:
        for row in range(first, last):
            clear(out + 4 * (row * tokens + num_tokens), 4 * (tokens - num_tokens))


@begins()
def _begin(frame, place):  # type: ignore[no-untyped-def]
    """Leaves the rows of an item: few long strips, since memory is read best in order."""
    outputs = size(operand(frame, _WEIGHT), 0)
    strip = padded((outputs - 1) // (STRIPS * num_threads(frame)) + 1, GROUP)
    memory = allocate(8)
    words(memory, 1)[0] = strip
    words(place, 1)[0] = memory
    return (outputs + strip - 1) // strip


@does()
def _do(frame, memory, item):  # type: ignore[no-untyped-def]
    """One strip of the weight, for all tokens that there are."""
    x, weight = operand(frame, _X), operand(frame, _WEIGHT)
    tokens, width, outputs = size(x, 0), size(x, 1), size(weight, 0)
    strip = words(memory, 1)[0]
    # Counted from the last: items are taken in that order, and memory is read from the first.
    first = ((outputs - 1) // strip - item) * strip
    last = min(first + strip, outputs)
    x_at, weight_at, out = data(x), data(weight), data(result(frame, 0))
    num_tokens = max(min(ints(data(operand(frame, _NUM_TOKENS)), 1)[0], tokens), 0)
    if tokens >= COLUMNS_FROM:
        _many_tokens(x_at, weight_at, out, tokens, num_tokens, width, first, last)
    elif num_tokens:
        _few_tokens(x_at, weight_at, out, num_tokens, width, outputs, first, last)
    _clear(out, tokens, num_tokens, outputs, first, last)
    return 0


@ends()
def _end(frame, memory):  # type: ignore[no-untyped-def]
    return 0


def make_call() -> Any:
    """The handler of the custom call whose operands and results `cpu.linear` names."""
    return make_handler(_begin, _do, _end)
