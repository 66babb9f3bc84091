"""Small matrix products in registers, for Numba: what its loops over arrays are not turned into.

Narrower numbers become float32 in registers. Of bfloat16, a vector's numbers at even places and
those at odd ones are two vectors there. What it is multiplied with, or summed up in, is split
alike: of every 2 * LANES numbers of a row, those at even places come first. 8 bits keep their
order; those of float8_e4m3fn come out FP8_SCALE times too small.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from pallas_kernels.cpu_calls.memory import fetch, intrinsic

Kind = Literal["float32", "bfloat16", "int8", "fp8"]  # of the numbers of a matrix in memory
LINE = 64  # bytes of a cache line
FP8_SCALE = 256  # what a float8_e4m3fn is short of as the float16 with its bits
# A wide CPU has 32 registers of 16 float32, a narrow one 16 of 8: what sums may take of them
# leaves some for what is multiplied.
_IS_WIDE = llvm.get_host_cpu_features().get("avx512f", False)
LANES = 16 if _IS_WIDE else 8
SUMS = 24 if _IS_WIDE else 12

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_FOUR = 4
_FOUR_FLOATS = ir.VectorType(_FLOAT, _FOUR)
# Nothing is reordered: a sum comes out alike in tiles of any size, alone or among others.
_FUSED = ("contract",)


def _at(builder: Any, base: Any, index: Any, kind: Any, size: int = 4) -> Any:
    """A pointer to number `index`, of `size` bytes each, of what is at an address."""
    return builder.inttoptr(builder.add(base, builder.mul(index, _I64(size))), kind.as_pointer())


def _load(builder: Any, base: Any, index: Any) -> Any:
    return builder.load(_at(builder, base, index, _VECTOR), align=4)


def _load_halves(builder: Any, base: Any, index: Any) -> list[Any]:
    """Two vectors of 2 * LANES bfloat16: those at even and those at odd places, as float32."""
    kind = ir.VectorType(_I32, LANES)
    words = builder.load(_at(builder, base, index, kind, 2), align=2)
    even = builder.shl(words, ir.Constant(kind, [16] * LANES))
    odd = builder.and_(words, ir.Constant(kind, [0xFFFF0000] * LANES))
    return [builder.bitcast(half, _VECTOR) for half in (even, odd)]


def float_of_fp8(builder: Any, codes: Any) -> Any:
    """float32 of a vector of float8_e4m3fn's bits, FP8_SCALE times too small.

    By way of float16, whose subnormal numbers count whatever the processor does with float32's.
    """
    count = codes.type.count
    kind = ir.VectorType(_I16, count)
    wide = builder.shl(builder.sext(codes, kind), ir.Constant(kind, [7] * count))
    bits = builder.and_(wide, ir.Constant(kind, [0xBF80] * count))  # the sign came twice
    halves = builder.bitcast(bits, ir.VectorType(ir.HalfType(), count))
    return builder.fpext(halves, ir.VectorType(_FLOAT, count))


def _load_vectors(builder: Any, base: Any, index: Any, kind: Kind) -> list[Any]:
    """The vectors of float32 that lie at a place: two of bfloat16, one of others."""
    if kind == "bfloat16":
        return _load_halves(builder, base, index)
    if kind == "float32":
        return [_load(builder, base, index)]
    octets = ir.VectorType(_I8, LANES)
    codes = builder.load(_at(builder, base, index, octets, 1), align=1)
    if kind == "fp8":
        return [float_of_fp8(builder, codes)]
    return [builder.sitofp(builder.sext(codes, ir.VectorType(_I32, LANES)), _VECTOR)]


def bytes_of(kind: Kind) -> int:
    """Bytes of a number in memory."""
    return {"float32": 4, "bfloat16": 2}.get(kind, 1)


def vectors_of(kind: Kind) -> int:
    """Vectors that numbers are loaded as, at least."""
    return 2 if kind == "bfloat16" else 1


def sum_products(builder: Any, count: Any, starts: Sequence[Any], add: Any) -> list[Any]:
    """A loop over k < count, `add(k, sums)` being the next sums, in registers throughout."""
    before = builder.block
    body, after = builder.append_basic_block("k"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed(">", count, _I64(0)), body, after)
    builder.position_at_end(body)
    k = builder.phi(_I64)
    sums = [builder.phi(start.type) for start in starts]
    added = add(k, sums)
    following = builder.add(k, _I64(1))
    k.add_incoming(_I64(0), before)
    k.add_incoming(following, body)
    builder.cbranch(builder.icmp_signed("<", following, count), body, after)
    builder.position_at_end(after)
    results = [builder.phi(start.type) for start in starts]  # a block begins with all its phis
    for phi, result, start, new in zip(sums, results, starts, added, strict=True):
        for target in (phi, result):
            target.add_incoming(start, before)
            target.add_incoming(new, body)
    return results


def _fma(builder: Any, total: Any, x: Any, y: Any) -> Any:
    return builder.fadd(total, builder.fmul(x, y, flags=_FUSED), flags=_FUSED)


def product_tile(
    rows: int,
    vectors: int,
    *,
    adds: bool = True,
    fetches: Literal["a", "b"] | None = None,
    kind: Kind = "float32",
) -> Any:
    """out [rows, vectors * LANES] += a [rows, count] @ b [count, vectors * LANES].

    Args:
        rows, vectors: of the tile; their product is how many sums it holds.
        adds: to what is in out; otherwise that is overwritten.
        fetches: an address follows the other arguments, of the next a (`rows * count` numbers), or
            of the next b, which is fetched meanwhile. Then it is memory's speed and not its latency
            that holds up what is large and read once.
        kind: of b. Of bfloat16 `vectors` is even, and out is split (see the module).

    Returns:
        An intrinsic (out, out_stride, a, a_stride, b, b_stride, count[, ahead]) for Numba: strides
        are numbers from row to row.
    """
    size, step = bytes_of(kind), vectors_of(kind)

    def emit(builder: Any, out: Any, out_stride: Any, a: Any, a_stride: Any, b: Any, b_stride: Any,
             count: Any, ahead: Any = None) -> None:  # fmt: skip
        indices = [
            builder.add(builder.mul(out_stride, _I64(row)), _I64(vector * LANES))
            for row in range(rows)
            for vector in range(vectors)
        ]

        def fetch_next(k: Any, row_of_b: Any) -> None:
            if fetches == "a":
                fetch(builder, builder.add(ahead, builder.mul(k, _I64(4 * rows))))
            if fetches == "b":
                start = builder.add(ahead, builder.mul(row_of_b, _I64(size)))
                for line in range(0, vectors * LANES * size, LINE):
                    fetch(builder, builder.add(start, _I64(line)))

        def row_of(row_of_b: Any) -> list[Any]:
            starts = [builder.add(row_of_b, _I64(vector * LANES)) for vector in range(vectors)]
            loaded = (_load_vectors(builder, b, start, kind) for start in starts[::step])
            return [vector for vectors in loaded for vector in vectors]

        def add(k: Any, sums: Sequence[Any]) -> list[Any]:
            row_of_b = builder.mul(k, b_stride)
            fetch_next(k, row_of_b)
            values, added = row_of(row_of_b), []
            for row in range(rows):
                index = builder.add(builder.mul(a_stride, _I64(row)), k)
                number = _spread(builder, builder.load(_at(builder, a, index, _FLOAT)))
                mine = sums[row * vectors : (row + 1) * vectors]
                added += [_fma(builder, *each, number) for each in zip(mine, values, strict=True)]
            return added

        zero = ir.Constant(_VECTOR, [0.0] * LANES)
        starts = [_load(builder, out, index) if adds else zero for index in indices]
        results = sum_products(builder, count, starts, add)
        for index, value in zip(indices, results, strict=True):
            builder.store(value, _at(builder, out, index, _VECTOR), align=4)

    return as_intrinsic(emit, 7 if fetches is None else 8)


def dot_tile(rows: int, columns: int, *, kind: Kind = "float32", fetches: bool = True) -> Any:
    """out [rows, columns] = a [rows, count * LANES] @ b [columns, count * LANES], transposed.

    Args:
        rows, columns: of the tile; their product is how many sums it holds.
        kind: of b. With bfloat16 a is split (see the module), and `count` of 2 * LANES numbers.
        fetches: as of `product_tile`, of the next b.

    Returns:
        An intrinsic (out, out_stride, a, a_stride, b, b_stride, count[, ahead]) for Numba.
    """
    size, vectors = bytes_of(kind), vectors_of(kind)

    def emit(builder: Any, out: Any, out_stride: Any, a: Any, a_stride: Any, b: Any, b_stride: Any,
             count: Any, ahead: Any = None) -> None:  # fmt: skip
        def add(k: Any, sums: Sequence[Any]) -> list[Any]:
            first = builder.mul(k, _I64(vectors * LANES))

            def starts(stride: Any, number: int) -> list[Any]:
                rows = (builder.mul(stride, _I64(row)) for row in range(number))
                return [builder.add(row, first) for row in rows]

            if fetches and size == 1:  # a vector is a part of a line: rows lie one after the other
                step = _I64(columns * LANES)
                fetch(builder, builder.add(ahead, builder.mul(k, step)))
            of_b = []
            for start in starts(b_stride, columns):
                if fetches and size > 1:
                    fetch(builder, builder.add(ahead, builder.mul(start, _I64(size))))
                of_b.append(_load_vectors(builder, b, start, kind))
            of_a = [
                [_load(builder, a, builder.add(start, _I64(v * LANES))) for v in range(vectors)]
                for start in starts(a_stride, rows)
            ]
            for part in range(vectors):
                pairs = itertools.product([x[part] for x in of_a], [y[part] for y in of_b])
                sums = [
                    _fma(builder, total, *pair) for total, pair in zip(sums, pairs, strict=True)
                ]
            return list(sums)

        zero = ir.Constant(_VECTOR, [0.0] * LANES)
        results = sum_products(builder, count, [zero] * (rows * columns), add)
        for row in range(rows):
            mine = results[row * columns : (row + 1) * columns]
            start = builder.mul(out_stride, _I64(row))
            if columns == _FOUR:
                place = _at(builder, out, start, _FOUR_FLOATS)
                builder.store(four_totals(builder, mine), place, align=4)
                continue
            for column, value in enumerate(mine):
                index = builder.add(start, _I64(column))
                builder.store(_total(builder, value), _at(builder, out, index, _FLOAT))

    return as_intrinsic(emit, 8 if fetches else 7)


def _total(builder: Any, vector: Any) -> Any:
    """The sum of a vector's numbers."""
    reduction = ir.FunctionType(_FLOAT, [_FLOAT, _VECTOR])
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    reduce = cgutils.get_or_insert_function(builder.module, reduction, name)
    return builder.call(reduce, [_FLOAT(-0.0), vector], fastmath=("reassoc",))


def four_totals(builder: Any, vectors: Sequence[Any]) -> Any:
    """The sums of four vectors' numbers, as one vector of four.

    Adding up one vector is four shuffles one after the other, which may take longer than the
    products; four vectors are added up in little more than one.
    """
    lanes_of_each = vectors[0].type.count

    def both(x: Any, y: Any, picked: Sequence[Sequence[int]]) -> Any:
        """The sum of two choices from every four numbers of x (0 to 3) and of y (4 to 7)."""
        parts = []
        for choice in picked:
            lanes = [
                group + lane % 4 + (lanes_of_each if lane >= 4 else 0)
                for group in range(0, lanes_of_each, 4)
                for lane in choice
            ]
            mask = ir.Constant(ir.VectorType(_I32, lanes_of_each), lanes)
            parts.append(builder.shuffle_vector(x, y, mask))
        return builder.fadd(*parts, flags=_FUSED)

    first, second = (
        both(x, y, [(0, 4, 1, 5), (2, 6, 3, 7)]) for x, y in (vectors[:2], vectors[2:])
    )
    total, size = both(first, second, [(0, 1, 4, 5), (2, 3, 6, 7)]), lanes_of_each
    while size > _FOUR:
        size //= 2
        halves = [
            builder.shuffle_vector(
                total,
                total,
                ir.Constant(ir.VectorType(_I32, size), list(range(start, start + size))),
            )
            for start in (0, size)
        ]
        total = builder.fadd(*halves, flags=_FUSED)
    return total


def _spread(builder: Any, number: Any) -> Any:
    """A vector of one number."""
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, number, _I32(0))
    zeros = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return builder.shuffle_vector(first, undefined, zeros)


def as_intrinsic(emit: Any, count: int) -> Any:
    """What `emit` writes, for Numba: a function of `count` addresses and numbers."""

    @intrinsic
    def tile(_: Any, *given: Any) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            emit(builder, *cgutils.unpack_tuple(builder, args[0]))
            return context.get_dummy_value()

        return types.void(types.StarArgTuple([types.int64] * count)), codegen

    return tile


@njit(forceinline=True)
def padded(size: int, to: int) -> int:
    """The next multiple of `to`."""
    return (size + to - 1) // to * to
