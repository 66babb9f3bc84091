"""What the custom calls of `linear` on CPUs for quantised weights have in common.

Every output is summed up in one order, however many tokens there are: rows of the weight are made
ready in a cache and multiplied with all tokens, in tiles that always have COLUMNS rows of it.
"""

from typing import Any

from numba import njit

from pallas_kernels.cpu_calls.handler import data, kind, num_threads, operand, result, size
from pallas_kernels.cpu_calls.memory import allocate, clear, copy, ints, words
from pallas_kernels.cpu_calls.tiles import LINE, padded
from pallas_kernels.linear.cpu_rows import read_scales, scale_bytes

COLUMNS = MOST_TOKENS = 4  # of a tile: rows of the weight, and tokens
STRIPS = 2  # items per thread: one that comes late leaves some to the others
MANY = 16  # rows of the weight made ready at once where tokens are more than one tile's
X, VALUES, SCALES, MINIMUMS, NUM_TOKENS = range(5)  # the calls' operands
STRIP, TOKENS, X_AT = range(3)  # words of a call's memory
_HEADER = LINE


@njit
def prepare_call(frame, place, row_bytes):  # type: ignore[no-untyped-def]
    """The number of items, and the call's memory, with room for every token's activations."""
    outputs = size(operand(frame, VALUES), 0)
    tokens = max(min(ints(data(operand(frame, NUM_TOKENS)), 1)[0], size(operand(frame, X), 0)), 0)
    strip = padded((outputs - 1) // (STRIPS * num_threads(frame)) + 1, MANY)
    memory = allocate(_HEADER + LINE + tokens * row_bytes)
    fields = words(memory, 3)
    fields[STRIP], fields[TOKENS] = strip, tokens
    fields[X_AT] = padded(memory + _HEADER, LINE)
    words(place, 1)[0] = memory
    return (outputs + strip - 1) // strip


@njit(forceinline=True)
def read_rows(frame, row, scales, minimums, groups, count):  # type: ignore[no-untyped-def]
    """The scales of `count` rows of the weight as float32, and their minimums or zeros."""
    number_kind = kind(operand(frame, SCALES))
    start = row * scale_bytes(number_kind) * groups
    read_scales(scales, data(operand(frame, SCALES)) + start, number_kind, count * groups)
    if size(operand(frame, MINIMUMS), 0):
        read_scales(minimums, data(operand(frame, MINIMUMS)) + start, number_kind, count * groups)
    else:
        clear(minimums, 4 * count * groups)


def make_multiply(make_tile: Any) -> Any:
    """A product of any size from tiles of 1, 2 and MOST_TOKENS tokens.

    Args:
        make_tile: (tokens) -> for Numba, (out, out_stride, x, row, shape): addresses, and a row
            of the weight is as long as one of x, `shape[0]` bytes.

    Returns:
        For Numba: (out, out_stride, x, tokens, rows, count, shape, spare), of `count` rows of the
        weight; room for whole tiles' rows follows them. `spare` has room for a tile's results.
    """
    one, two, most = (make_tile(tokens) for tokens in (1, 2, MOST_TOKENS))

    @njit
    def multiply(out, out_stride, x, tokens, rows, count, shape, spare):  # type: ignore[no-untyped-def]
        token = 0
        while token < tokens:
            left = tokens - token
            done = MOST_TOKENS if left >= MOST_TOKENS else 2 if left >= 2 else 1
            for column in range(0, count, COLUMNS):
                place, row = out + 4 * (token * out_stride + column), rows + column * shape[0]
                target, stride = (
                    (place, out_stride) if column + COLUMNS <= count else (spare, COLUMNS)
                )
                if done == MOST_TOKENS:
                    most(target, stride, x, row, shape)
                elif done == 2:
                    two(target, stride, x, row, shape)
                else:
                    one(target, stride, x, row, shape)
                if column + COLUMNS > count:
                    for i in range(done):
                        mine = place + 4 * i * out_stride
                        copy(mine, spare + 4 * COLUMNS * i, 4 * (count - column))
            token += done
            x += done * shape[0]

    return multiply


@njit(forceinline=True)
def span(frame, memory, item):  # type: ignore[no-untyped-def]
    """First and last row of the weight of an item.

    Counted from the last: items are taken in that order, and memory is read from the first.
    """
    outputs, strip = size(operand(frame, VALUES), 0), words(memory, 1)[0]
    first = ((outputs - 1) // strip - item) * strip
    return first, min(first + strip, outputs)


@njit
def clear_rest(frame, tokens, first, last):  # type: ignore[no-untyped-def]
    """Zeros in columns first..last-1 of the rows behind the tokens that there are."""
    out, outputs = data(result(frame, 0)), size(operand(frame, VALUES), 0)
    for token in range(tokens, size(operand(frame, X), 0)):
        clear(out + 4 * (token * outputs + first), 4 * (last - first))
