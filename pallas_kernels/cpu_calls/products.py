"""Products of any size from tiles, for Numba: arrays are addresses, rows `stride` numbers apart."""

from typing import Any

from numba import njit

from pallas_kernels.cpu_calls.tiles import (
    LANES,
    SUMS,
    Kind,
    bytes_of,
    dot_tile,
    product_tile,
    vectors_of,
)

ROWS = 4
_COLUMNS = _VECTORS = SUMS // 6  # of a tile of four rows


def _by_tiles(make_tile: Any, width: int, edge: Any, edge_width: int, pitch: Any) -> Any:
    """A product of any size from tiles of `width` columns and 4 rows, or as many as are left.

    Args:
        make_tile: (rows) -> a tile that fetches.
        width: its columns.
        edge: a tile of one row and `edge_width` columns, for those that are left.
        edge_width: see `edge`.
        pitch: for Numba: (b_stride) -> bytes of b from column to column.

    Returns:
        For Numba: (out, out_stride, a, a_stride, b, b_stride, rows, columns, count, ahead), with
        `count` as tiles take it.
    """
    four, three, two, one = (make_tile(rows) for rows in (4, 3, 2, 1))

    @njit(inline="always")
    def product(out, out_stride, a, a_stride, b, b_stride, rows, columns, count, ahead):  # type: ignore[no-untyped-def]
        step, whole = pitch(b_stride), columns // width * width
        for row in range(0, rows, 4):
            left, a_row = rows - row, a + 4 * row * a_stride
            for column in range(0, whole, width):
                target, at = out + 4 * (row * out_stride + column), column * step
                b_at, next_at = b + at, ahead + at
                if left >= 4:
                    four(target, out_stride, a_row, a_stride, b_at, b_stride, count, next_at)
                elif left == 3:
                    three(target, out_stride, a_row, a_stride, b_at, b_stride, count, next_at)
                elif left == 2:
                    two(target, out_stride, a_row, a_stride, b_at, b_stride, count, next_at)
                else:
                    one(target, out_stride, a_row, a_stride, b_at, b_stride, count, next_at)
        for row in range(rows):
            for column in range(whole, columns, edge_width):
                target, at = out + 4 * (row * out_stride + column), column * step
                a_row, b_at, next_at = a + 4 * row * a_stride, b + at, ahead + at
                edge(target, out_stride, a_row, a_stride, b_at, b_stride, count, next_at)

    return product


def make_dots(kind: Kind) -> Any:
    """out [rows, columns] = a [rows, count * LANES] @ b [columns, count * LANES], transposed.

    Args:
        kind: of b. With bfloat16 a is split (see `tiles`), and `count` of 2 * LANES numbers.

    Returns:
        For Numba: (out, out_stride, a, a_stride, b, b_stride, rows, columns, count, ahead), of any
        rows and columns; at the address `ahead` the next b is fetched.
    """
    size = bytes_of(kind)

    @njit(inline="always")
    def pitch(b_stride):  # type: ignore[no-untyped-def]
        return size * b_stride

    return _by_tiles(
        lambda rows: dot_tile(rows, _COLUMNS, kind=kind),
        _COLUMNS,
        dot_tile(1, 1, kind=kind),
        1,
        pitch,
    )


def make_sums(kind: Kind) -> Any:
    """out [rows, columns] += a [rows, count] @ b [count, columns].

    Args:
        kind: of b. With bfloat16 out is split (see `tiles`).

    Returns:
        For Numba, as of `make_dots`; `columns` is a multiple of LANES, with bfloat16 of 2 * LANES.
    """
    size, least = bytes_of(kind), vectors_of(kind)

    @njit(inline="always")
    def pitch(b_stride):  # type: ignore[no-untyped-def]
        return size

    def tile(rows: int, vectors: int = _VECTORS) -> Any:
        return product_tile(rows, vectors, fetches="b", kind=kind)

    return _by_tiles(tile, _VECTORS * LANES, tile(1, least), least * LANES, pitch)


_wide_tile, _narrow_tile = product_tile(ROWS, _VECTORS), product_tile(ROWS, 1)


@njit(inline="always")
def multiply_add(out, out_stride, a, a_stride, b, b_stride, rows, count, columns):  # type: ignore[no-untyped-def]
    """out [rows, columns] += a [rows, count] @ b [count, columns], float32, all of it in a cache.

    `rows` is a multiple of ROWS and `columns` one of LANES: what is not wanted is padded.
    """
    for row in range(0, rows, ROWS):
        out_row, a_row = out + 4 * row * out_stride, a + 4 * row * a_stride
        column = 0
        while column + _VECTORS * LANES <= columns:
            _wide_tile(
                out_row + 4 * column, out_stride, a_row, a_stride, b + 4 * column, b_stride, count
            )
            column += _VECTORS * LANES
        while column < columns:
            _narrow_tile(
                out_row + 4 * column, out_stride, a_row, a_stride, b + 4 * column, b_stride, count
            )
            column += LANES
