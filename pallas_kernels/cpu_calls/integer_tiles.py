"""Products of bytes in registers, for Numba: 8-bit activations times codes of weights.

Both operands' rows are in segments of 128 codes, of four blocks of 32. A segment's first 64 bytes
are the blocks' first halves, the next 64 their second ones, so that a fourth of a register belongs
to one block: sums of a block are in lanes of their own, and are scaled lane by lane. Behind the
codes is the scale of each lane, float32; where groups are of 16, and a block's halves have scales
of their own, twice as many.
"""

from collections.abc import Sequence
from typing import Any, Literal

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit
from numba.core import cgutils

from pallas_kernels.cpu_calls import tiles

SEGMENT = 128  # codes
FOURTH = 16  # bytes of a segment's 64 that belong to one block
_WIDEST = 16  # lanes of 64 bytes

Instructions = Literal["vnni", "avx2", "any"]

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()
_CONTRACT = ("contract",)


def best_instructions() -> tuple[Instructions, int]:
    """What multiplies bytes fastest on this CPU, and in how many lanes."""
    features = llvm.get_host_cpu_features()

    def has(*names: str) -> bool:
        return all(features.get(name, False) for name in names)

    if has("avx512vnni", "avx512bw"):
        return "vnni", 16
    if has("avxvnni"):
        return "vnni", 8
    return ("avx2" if has("avx2") else "any"), 8


def is_unsigned(instructions: Instructions) -> bool:
    """Whether weights' codes are taken as numbers from 0 to 255, not from -128 to 127."""
    return instructions == "vnni"


@njit(forceinline=True)
def segment_bytes(parts: int) -> int:
    """Bytes of a segment, with its scales for 1 or 2 parts of a block."""
    return SEGMENT + 4 * _WIDEST * parts


def byte_dot_tile(
    rows: int, columns: int, parts: int, instructions: Instructions, lanes: int
) -> Any:
    """out [rows, columns] = a times b, transposed, plus what minimums add.

    Args:
        rows: of activations.
        columns: of weights; 4.
        parts: of a block that have scales of their own: 1 or 2.
        instructions: as of `best_instructions`.
        lanes: of int32 in a register.

    Returns:
        An intrinsic (out, out_stride, a, a_pitch, a_sums, b, b_pitch, b_minimums, count, groups)
        for Numba: `out_stride` in numbers, pitches in bytes; `a_sums` and `b_minimums` are where
        rows' float32 for each group lie, a pitch apart as well, in `groups` registers.
    """
    floats, size = ir.VectorType(_FLOAT, lanes), segment_bytes(parts)

    def load(builder: Any, base: Any, row: int, pitch: Any, offset: Any, kind: Any) -> Any:
        start = builder.add(builder.add(base, builder.mul(pitch, _I64(row))), offset)
        return builder.load(builder.inttoptr(start, kind.as_pointer()), align=4)

    def emit(builder: Any, out: Any, out_stride: Any, a: Any, a_pitch: Any, a_sums: Any, b: Any,
             b_pitch: Any, b_minimums: Any, count: Any, groups: Any) -> None:  # fmt: skip
        def add_minimums(k: Any, sums: Sequence[Any]) -> list[Any]:
            offset = builder.mul(k, _I64(4 * lanes))
            mine = [load(builder, b_minimums, c, b_pitch, offset, floats) for c in range(columns)]
            added = []
            for row in range(rows):
                other = load(builder, a_sums, row, a_pitch, offset, floats)
                totals = sums[row * columns :][:columns]
                added += [
                    _add_product(builder, t, m, other) for t, m in zip(totals, mine, strict=True)
                ]
            return added

        def add(k: Any, sums: Sequence[Any]) -> list[Any]:
            segment = builder.mul(k, _I64(size))
            for first in range(0, _WIDEST, lanes):
                sums = add_lanes(segment, 4 * first, sums)
            return list(sums)

        def add_lanes(segment: Any, first: int, sums: Sequence[Any]) -> list[Any]:
            """The sums with what `lanes` of a segment's lanes add, from byte `first` on."""
            kind = ir.VectorType(_I8, 4 * lanes)

            def both(base: Any, row: int, pitch: Any) -> tuple[list[Any], list[Any]]:
                """Codes of the blocks' halves, and scales of their parts."""
                codes, scales = (
                    [
                        load(builder, base, row, pitch, builder.add(segment, _I64(at + first)), of)
                        for at in starts
                    ]
                    for starts, of in (
                        ((0, SEGMENT // 2), kind),
                        (range(SEGMENT, size, 4 * _WIDEST), floats),
                    )
                )
                return codes, scales

            weights = [both(b, column, b_pitch) for column in range(columns)]
            added = []
            for row in range(rows):
                codes, scales = both(a, row, a_pitch)
                for column, (others, factors) in enumerate(weights):
                    total = sums[row * columns + column]
                    dots = [_integer(ir.VectorType(_I32, lanes), 0)] * parts
                    for half in range(2):
                        part = half % parts
                        dots[part] = _dot(
                            builder, instructions, dots[part], others[half], codes[half]
                        )
                    for dot, scale, factor in zip(dots, scales, factors, strict=True):
                        number = builder.sitofp(dot, floats)
                        both_scales = builder.fmul(scale, factor)
                        total = _add_product(builder, total, number, both_scales)
                    added.append(total)
            return added

        zero = ir.Constant(floats, [0.0] * lanes)
        sums = tiles.sum_products(builder, groups, [zero] * (rows * columns), add_minimums)
        sums = tiles.sum_products(builder, count, sums, add)
        for row in range(rows):
            total = tiles.four_totals(builder, sums[row * columns :][:columns])
            start = builder.add(out, builder.mul(out_stride, _I64(4 * row)))
            builder.store(total, builder.inttoptr(start, total.type.as_pointer()), align=4)

    return tiles.as_intrinsic(emit, 10)


def _integer(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _add_product(builder: Any, total: Any, x: Any, y: Any) -> Any:
    return builder.fadd(total, builder.fmul(x, y, flags=_CONTRACT), flags=_CONTRACT)


def _dot(builder: Any, instructions: Instructions, total: Any, weights: Any, x: Any) -> Any:
    """int32 sums plus the products of four bytes each."""
    lanes = total.type.count

    def call(name: str, kind: Any, *operands: Any) -> Any:
        function = ir.FunctionType(kind, [each.type for each in operands])
        return builder.call(
            cgutils.get_or_insert_function(builder.module, function, name), operands
        )

    if instructions == "vnni":
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        return call(name, total.type, total, weights, x)
    if instructions == "avx2":
        # Products of two bytes each must fit int16: 128 times 127, twice, does, 255 would not.
        negative = builder.icmp_signed("<", weights, _integer(weights.type, 0))
        size = builder.select(negative, builder.neg(weights), weights)
        signed = call("llvm.x86.avx2.psign.b", x.type, x, weights)
        pairs = ir.VectorType(_I16, 2 * lanes)
        products = call("llvm.x86.avx2.pmadd.ub.sw", pairs, size, signed)
        dots = call("llvm.x86.avx2.pmadd.wd", total.type, products, _integer(pairs, 1))
        return builder.add(total, dots)
    wide = ir.VectorType(_I32, 4 * lanes)
    products = builder.mul(builder.sext(weights, wide), builder.sext(x, wide))
    for place in range(4):
        chosen = ir.Constant(total.type, list(range(place, 4 * lanes, 4)))
        total = builder.add(total, builder.shuffle_vector(products, products, chosen))
    return total
