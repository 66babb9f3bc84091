"""Blocks of quantised weights in registers, for Numba: their codes as float32 or as bytes.

A block is of 32 codes (`pallas_kernels.weights`); where they have 4 bits, a vector's numbers are
looked up among the 16 that a code can stand for.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from pallas_kernels.cpu_calls.memory import fetch, intrinsic
from pallas_kernels.cpu_calls.tiles import LANES, float_of_fp8

BLOCK = 32
HALF = 16  # codes that lie together in a block of less than 8 bits
AHEAD = 1024  # bytes: how far from what is read the next lines are fetched

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT, _HALF_FLOAT = ir.FloatType(), ir.HalfType()


def _vector(kind: Any, count: int) -> Any:
    return ir.VectorType(kind, count)


def _constant(kind: Any, count: int, value: Any) -> Any:
    return ir.Constant(_vector(kind, count), [value] * count)


def _load(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    pointer = builder.inttoptr(builder.add(address, _I64(offset)), kind.as_pointer())
    return builder.load(pointer, align=1)


def _store(builder: Any, value: Any, address: Any, offset: int) -> None:
    place = builder.inttoptr(builder.add(address, _I64(offset)), value.type.as_pointer())
    builder.store(value, place, align=1)


def _spread(builder: Any, number: Any, count: int) -> Any:
    kind = _vector(number.type, count)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), number, _I32(0))
    zeros = ir.Constant(_vector(_I32, count), [0] * count)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)


def _part(builder: Any, value: Any, start: int, count: int) -> Any:
    if value.type.count == count:
        return value
    lanes = ir.Constant(_vector(_I32, count), list(range(start, start + count)))
    return builder.shuffle_vector(value, value, lanes)


def _halves(builder: Any, values: Any, bits: int) -> list[Any]:
    """The codes of a block, as they are stored: two vectors of 16 bytes."""
    kind = _vector(_I8, HALF)
    if bits == 8:
        return [_load(builder, values, offset, kind) for offset in (0, HALF)]
    pairs = _load(builder, values, 0, kind)
    low = builder.and_(pairs, _constant(_I8, HALF, 15))
    halves = [low, builder.lshr(pairs, _constant(_I8, HALF, 4))]
    for bit in range(4, bits):
        plane = _load(builder, values, HALF + (bit - 4) * BLOCK // 8, _I32)
        ones = builder.bitcast(plane, _vector(ir.IntType(1), BLOCK))
        for half in range(2):
            mask = _part(builder, ones, half * HALF, HALF)
            high = builder.select(mask, _constant(_I8, HALF, 1 << bit), _constant(_I8, HALF, 0))
            halves[half] = builder.or_(halves[half], high)
    return halves


def make_float_block(codes: str) -> Any:
    """A block's numbers, `scale * code + minimum`.

    Args:
        codes: "int4", ..., as of `pallas_kernels.weights.Format`.

    Returns:
        An intrinsic (target, values, scale, minimum, scale_2, minimum_2) for Numba: addresses, and
        float32 for the first half of the block and for the second. For "fp8" scales are
        `tiles.FP8_SCALE` times those of the numbers.
    """
    bits = {"int4": 4, "int5": 5, "int6": 6}.get(codes, 8)

    def number(builder: Any, half: Any, start: int, scale: Any, minimum: Any) -> Any:
        """LANES numbers of a half."""
        part = _part(builder, half, start, LANES)
        if codes == "fp8":
            floats = float_of_fp8(builder, part)
        else:
            extend = builder.sext if codes == "int8" else builder.zext
            floats = builder.sitofp(extend(part, _vector(_I32, LANES)), _vector(_FLOAT, LANES))
        product = builder.fmul(floats, scale, flags=("contract",))
        return builder.fadd(product, minimum, flags=("contract",))

    def emit(builder: Any, target: Any, values: Any, *numbers: Any) -> None:
        fetch(builder, builder.add(values, _I64(AHEAD)))
        if codes == "int4" and LANES == HALF:
            return looked_up(builder, target, values, *numbers)
        spread = [_spread(builder, each, LANES) for each in numbers]
        for index, half in enumerate(_halves(builder, values, bits)):
            for start in range(0, HALF, LANES):
                value = number(builder, half, start, *spread[2 * index : 2 * index + 2])
                _store(builder, value, target, 4 * (index * HALF + start))

    def looked_up(builder: Any, target: Any, values: Any, *numbers: Any) -> None:
        """Codes of 4 bits: `permute` looks at the lowest 4 bits of each lane only."""
        table = _vector(_FLOAT, HALF)
        kind = ir.FunctionType(table, [table, _vector(_I32, HALF)])
        permute = cgutils.get_or_insert_function(
            builder.module, kind, "llvm.x86.avx512.permvar.sf.512"
        )
        pairs = _load(builder, values, 0, _vector(_I8, HALF))
        lanes = builder.zext(pairs, _vector(_I32, HALF))
        steps = ir.Constant(table, [float(code) for code in range(HALF)])
        for index in range(2):
            scale, minimum = (_spread(builder, each, HALF) for each in numbers[2 * index :][:2])
            product = builder.fmul(steps, scale, flags=("contract",))
            choices = builder.fadd(product, minimum, flags=("contract",))
            _store(builder, builder.call(permute, [choices, lanes]), target, 4 * index * HALF)
            lanes = builder.lshr(lanes, _constant(_I32, HALF, 4))

    return _as_intrinsic(emit, 2, 4)


def make_byte_block(codes: str, *, subtracts: int, flips: bool) -> Any:
    """A block's codes as bytes, where an integer tile has them.

    Args:
        codes: "int4", "int5", "int6" or "int8".
        subtracts: from every code.
        flips: the highest bit, so that int8 becomes `code + 128`.

    Returns:
        An intrinsic (target, values, distance) for Numba: the block's halves come to lie at
        target and `distance` bytes after it.
    """
    bits = {"int4": 4, "int5": 5, "int6": 6}.get(codes, 8)

    def emit(builder: Any, target: Any, values: Any, distance: Any) -> None:
        fetch(builder, builder.add(values, _I64(AHEAD)))
        for half in _halves(builder, values, bits):
            value = half
            if subtracts:
                value = builder.sub(value, _constant(_I8, HALF, subtracts))
            if flips:
                value = builder.xor(value, _constant(_I8, HALF, 128))
            _store(builder, value, target, 0)
            target = builder.add(target, distance)

    return _as_intrinsic(emit, 3, 0)


def make_four_blocks(*, subtracts: int) -> Any:
    """What `make_byte_block` makes, of four blocks of 4-bit codes at once: a whole segment."""
    count = 4 * HALF

    def emit(builder: Any, target: Any, values: Any, distance: Any) -> None:
        fetch(builder, builder.add(values, _I64(AHEAD)))
        pairs = _load(builder, values, 0, _vector(_I8, count))
        low = builder.and_(pairs, _constant(_I8, count, 15))
        for half in (low, builder.lshr(pairs, _constant(_I8, count, 4))):
            _store(builder, builder.sub(half, _constant(_I8, count, subtracts)), target, 0)
            target = builder.add(target, distance)

    return _as_intrinsic(emit, 3, 0)


def _as_intrinsic(emit: Callable[..., Any], addresses: int, numbers: int) -> Any:
    """What `emit` writes, for Numba: a function of int64 and then of float32."""
    given = [types.int64] * addresses + [types.float32] * numbers

    @intrinsic
    def block(_: Any, *_given: Any) -> Any:
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            emit(builder, *cgutils.unpack_tuple(builder, args[0]))
            return context.get_dummy_value()

        return types.void(types.StarArgTuple(given)), codegen

    return block


WIDENED = 8  # numbers that are made float32 at once


def _make_widen(kind: Any, widen: Callable[[Any, Any], Any], count: int) -> Any:
    """An intrinsic (target, source) for Numba: `count` numbers of 16 bits become float32."""

    def emit(builder: Any, target: Any, source: Any) -> None:
        _store(builder, widen(builder, _load(builder, source, 0, _vector(kind, count))), target, 0)

    return _as_intrinsic(emit, 2, 0)


def _from_float16(builder: Any, numbers: Any) -> Any:
    return builder.fpext(numbers, _vector(_FLOAT, numbers.type.count))


def _from_bfloat16(builder: Any, numbers: Any) -> Any:
    count = numbers.type.count
    bits = builder.zext(numbers, _vector(_I32, count))
    return builder.bitcast(builder.shl(bits, _constant(_I32, count, 16)), _vector(_FLOAT, count))


widen_float16, widen_float16s = (
    _make_widen(_HALF_FLOAT, _from_float16, count) for count in (1, WIDENED)
)
widen_bfloat16, widen_bfloat16s = (
    _make_widen(_I16, _from_bfloat16, count) for count in (1, WIDENED)
)


def make_lane_scales(parts: int) -> Any:
    """The scales of a segment's lanes (`integer_tiles`), one for each block or half of one.

    Args:
        parts: scales of a block, 1 or 2.

    Returns:
        An intrinsic (target, source) for Numba: from four, or eight, float32.
    """
    blocks, lanes = 4, 4

    def emit(builder: Any, target: Any, source: Any) -> None:
        scales = _load(builder, source, 0, _vector(_FLOAT, blocks * parts))
        for part in range(parts):
            chosen = [block * parts + part for block in range(blocks) for _ in range(lanes)]
            mask = ir.Constant(_vector(_I32, blocks * lanes), chosen)
            spread = builder.shuffle_vector(scales, scales, mask)
            _store(builder, spread, target, 4 * blocks * lanes * part)

    return _as_intrinsic(emit, 2, 0)


def spread_floats(count: int) -> Any:
    """An intrinsic (target, number) for Numba that stores a float32 `count` times."""

    def emit(builder: Any, target: Any, number: Any) -> None:
        _store(builder, _spread(builder, number, count), target, 0)

    return _as_intrinsic(emit, 1, 1)
