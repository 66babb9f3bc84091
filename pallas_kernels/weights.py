"""Quantised weights: what they are made of, how they lie in memory, and how they are made.

A weight [out..., in] has groups along its inputs, each with a scale and, in some formats, a
minimum. It stands for `scale * (code - offset)`, or `scale * code + minimum`, in float32, where
codes are integers (`Format.offset` says what is taken off), or float8 for "fp8".

Codes of 8 bits are bytes. Codes of 4 to 6 bits lie in blocks of 32 inputs: 16 bytes whose low
halves are the first 16 codes' lowest four bits and whose high halves the others', so that
consecutive lanes come out of one mask and one shift; then, for each bit above the fourth, 32 bits
in the inputs' order, the first in the lowest bit of the first byte. Every array of a weight leads
with the outputs' axes: rows are looked up, and outputs split, in all of them alike. Inputs can be
split wherever no block or group is.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

BLOCK = 32  # inputs whose codes lie together, where they are of less than 8 bits
_HALF = BLOCK // 2
_LEAST_GROUP = 16
_BITS = {"int4": 4, "int5": 5, "int6": 6, "int8": 8, "fp8": 8}
_FP8 = ml_dtypes.float8_e4m3fn
_LARGEST_FP8 = float(ml_dtypes.finfo(_FP8).max)
_SCALES = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Format:
    """How numbers are quantised.

    Attributes:
        codes: "int4", "int5", "int6", "int8", or "fp8" (float8_e4m3fn).
        group: inputs that share a scale, a multiple of 16; 0: all inputs of an output do.
        scale: type of scales and minimums: "float16", "bfloat16" or "float32".
        has_minimums: a group stands for `scale * code + minimum`, with codes from 0 on (from -128
            on for "int8"); otherwise codes lie around zero.

    Raises:
        ValueError: there is no such format.
    """

    codes: str
    group: int = 0
    scale: str = "float32"
    has_minimums: bool = False

    def __post_init__(self) -> None:
        if self.codes not in _BITS:
            raise ValueError(f"no codes {self.codes!r}; there are {', '.join(_BITS)}")
        if self.scale not in _SCALES:
            raise ValueError(f"no scales of {self.scale!r}; there are {', '.join(_SCALES)}")
        if self.group < 0 or self.group % _LEAST_GROUP:
            raise ValueError(
                f"groups are of a multiple of {_LEAST_GROUP} inputs, or 0 for all, "
                f"not of {self.group}"
            )
        if self.codes == "fp8" and self.has_minimums:
            raise ValueError("fp8 has no minimums: its codes have signs")

    def __str__(self) -> str:
        group = f"g{self.group}" if self.group else "channel"
        return f"{self.codes}-{group}-{self.scale}" + ("-minimums" if self.has_minimums else "")

    @classmethod
    def parse(cls, name: str) -> Format:
        """The format of a name as `str` gives it, such as "int4-g32-float16-minimums".

        Raises:
            ValueError: there is no such format.
        """
        parts = re.fullmatch(r"(\w+)-(?:g(\d+)|channel)-(\w+?)(-minimums)?", name)
        if parts is None:
            raise ValueError(f"{name!r} is no format; write one like int4-g32-float16")
        codes, group, scale, minimums = parts.groups()
        return cls(codes, int(group or 0), scale, has_minimums=minimums is not None)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return _BITS[self.codes]

    @property
    def is_packed(self) -> bool:
        """Whether codes lie in blocks of BLOCK inputs (see the module)."""
        return self.bits < 8

    @property
    def offset(self) -> int:
        """What is taken off a code before the scale."""
        return 1 << (self.bits - 1) if self.is_packed and not self.has_minimums else 0

    @property
    def value_type(self) -> np.dtype:
        """Type of the array that holds the codes."""
        kinds = {"int8": np.int8, "fp8": _FP8}
        return np.dtype(kinds.get(self.codes, np.uint8))

    @property
    def bits_per_weight(self) -> float:
        """Bits in memory, scales included where groups have a size."""
        numbers = (2 if self.has_minimums else 1) * 8 * jnp.dtype(self.scale).itemsize
        return self.bits + (numbers / self.group if self.group else 0)

    def num_groups(self, inputs: int) -> int:
        """Groups of one output."""
        return inputs // self.group if self.group else 1

    def value_bytes(self, inputs: int) -> int:
        """Bytes of one output's codes."""
        return inputs * self.bits // 8

    def check_inputs(self, inputs: int, shards: int = 1) -> None:
        """Whether so many inputs can be quantised, and their codes be split over devices.

        Args:
            inputs: of the whole weight.
            shards: equal parts that the inputs are split into.

        Raises:
            ValueError: a group or a block would be cut.
        """
        unit = math.lcm(max(self.group, 1), BLOCK if self.is_packed else 1)
        if inputs < 1 or inputs % (unit * shards):
            parts = f" in each of {shards} shards" if shards > 1 else ""
            raise ValueError(
                f"{self} takes a multiple of {unit} inputs{parts}, not {inputs}; "
                "use a smaller group, or int8 per channel, which takes any number"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A weight [out..., in], quantised along its inputs; a pytree of its arrays.

    Made by `quantise` or `from_codes`, which look at what they are given; as a pytree it may hold
    anything else (shapes, shardings). More than one axis of inputs is flattened.

    Attributes:
        values: [out..., bytes of an output's codes], `format.value_type`.
        scales: [out..., groups], of the format's type.
        minimums: as scales, or None where the format has none.
        format: how the arrays are to be read.
    """

    values: Any
    scales: Any
    minimums: Any
    format: Format = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it stands for: (out..., in)."""
        return (*self.values.shape[:-1], self.values.shape[-1] * 8 // self.format.bits)

    @property
    def ndim(self) -> int:
        """Axes of the weight."""
        return len(self.values.shape)

    @property
    def dtype(self) -> np.dtype:
        """Type of the numbers that it stands for: float32."""
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        leaves = jax.tree.leaves(self)
        return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)

    def codes(self) -> Any:
        """Codes [out..., in], as they are stored: uint8, int8, or float8_e4m3fn."""
        return unpack(self.values, self.format)

    def dequantise(self) -> Any:
        """float32 [out..., in], in NumPy if the arrays are, in JAX otherwise."""
        codes = self.codes().astype(np.float32) - np.float32(self.format.offset)
        groups = codes.reshape(*self.scales.shape, -1)
        numbers = groups * self.scales.astype(np.float32)[..., None]
        if self.minimums is not None:
            numbers = numbers + self.minimums.astype(np.float32)[..., None]
        return numbers.reshape(self.shape)

    def check(self) -> None:
        """Whether the arrays' shapes and types are the format's.

        Raises:
            ValueError: they are not.
        """
        inputs = self.shape[-1]
        self.format.check_inputs(inputs)
        outputs = self.values.shape[:-1]
        groups = (*outputs, self.format.num_groups(inputs))
        wanted = {"values": (self.values.shape, self.format.value_type)}
        for name in ("scales", "minimums") if self.format.has_minimums else ("scales",):
            wanted[name] = (groups, jnp.dtype(self.format.scale))
        if self.minimums is not None and not self.format.has_minimums:
            raise ValueError(f"{self.format} has no minimums, and some were given")
        for name, (shape, kind) in wanted.items():
            array = getattr(self, name)
            found = None if array is None else (tuple(array.shape), jnp.dtype(array.dtype))
            if found != (tuple(shape), kind):
                has = "none" if found is None else f"{found[1].name}{list(found[0])}"
                raise ValueError(
                    f"{name} of {self.format} [{', '.join(map(str, self.shape))}] must be "
                    f"{kind.name}{list(shape)}, not {has}"
                )


def from_codes(codes: Any, scales: Any, minimums: Any, format: Format) -> Quantised:
    """A weight of codes that are known, such as those of a file.

    Args:
        codes: [out..., in], as they are stored: from 0 on for "int4" to "int6" (which means
            `code - offset` where there is no minimum), int8, or float8_e4m3fn.
        scales: [out..., groups], of the format's type.
        minimums: as scales, or None.
        format: of the result.

    Raises:
        ValueError: shapes or types do not fit the format.
    """
    format.check_inputs(codes.shape[-1])
    weight = Quantised(pack(codes, format), scales, minimums, format)
    weight.check()
    return weight


def quantise(array: Any, format: Format) -> Quantised:
    """The weight [out..., in] in a format, rounded to the nearest code.

    A group's scale is the smallest that reaches its largest number, in the format's type. Runs in
    NumPy if the array is one, in JAX otherwise.

    Args:
        array: floating, [out..., in].
        format: of the result.

    Raises:
        ValueError: the inputs do not fall into groups of the format.
    """
    format.check_inputs(array.shape[-1])
    xp: Any = np if isinstance(array, np.ndarray) else jnp
    groups = format.num_groups(array.shape[-1])
    numbers = array.astype(np.float32).reshape(*array.shape[:-1], groups, -1)
    scales, minimums = _range(numbers, format, xp)
    wide = scales.astype(np.float32)[..., None]
    if minimums is not None:
        numbers = numbers - minimums.astype(np.float32)[..., None]
    numbers = numbers / xp.where(wide == 0, np.float32(1), wide)
    if format.codes == "fp8":
        codes = xp.clip(numbers, -_LARGEST_FP8, _LARGEST_FP8).astype(_FP8)
    else:
        least = -128 if format.codes == "int8" else 0
        numbers = xp.rint(numbers) + (format.offset if minimums is None else least)
        kind = np.int8 if format.codes == "int8" else np.uint8
        codes = xp.clip(numbers, least, least + (1 << format.bits) - 1).astype(kind)
    if format.codes == "int8" and minimums is not None:
        # Codes begin at -128, and the minimum is what code 0 stands for.
        minimums = (minimums.astype(np.float32) + 128 * wide[..., 0]).astype(minimums.dtype)
    return from_codes(codes.reshape(array.shape), scales, minimums, format)


def _range(numbers: Any, format: Format, xp: Any) -> tuple[Any, Any]:
    """Scale and minimum of each group [..., inputs of a group], in the format's type."""
    kind, limits = jnp.dtype(format.scale), jnp.finfo(format.scale)

    def narrowed(values: Any) -> Any:
        return xp.clip(values, float(limits.min), float(limits.max)).astype(kind)

    low, high = numbers.min(-1), numbers.max(-1)
    if format.has_minimums:
        return narrowed((high - low) * np.float32(1 / ((1 << format.bits) - 1))), narrowed(low)
    largest = xp.maximum(abs(low), abs(high))
    if format.codes in ("int8", "fp8"):
        most = 127 if format.codes == "int8" else _LARGEST_FP8
        return narrowed(largest * np.float32(1 / most)), None
    # There is one more code below zero than above: the largest number takes it, whatever its sign.
    return narrowed(xp.where(abs(low) > abs(high), low, high) / -np.float32(format.offset)), None


def pack(codes: Any, format: Format) -> Any:
    """Codes [..., in] as they lie in memory (see the module); `unpack` is its inverse."""
    if not format.is_packed:
        return codes.astype(format.value_type)
    xp: Any = np if isinstance(codes, np.ndarray) else jnp
    blocks = codes.astype(np.uint8).reshape(*codes.shape[:-1], -1, BLOCK)
    low = blocks & np.uint8(15)
    parts = [low[..., :_HALF] | (low[..., _HALF:] << np.uint8(4))]
    for bit in range(4, format.bits):
        ones = (blocks >> np.uint8(bit)) & np.uint8(1)
        parts.append(xp.packbits(ones, axis=-1, bitorder="little"))
    return xp.concatenate(parts, axis=-1).reshape(*codes.shape[:-1], -1)


def unpack(values: Any, format: Format) -> Any:
    """Codes [..., in] of what lies in memory, in `format.value_type`."""
    if not format.is_packed:
        return values
    xp: Any = np if isinstance(values, np.ndarray) else jnp
    blocks = values.reshape(*values.shape[:-1], -1, format.value_bytes(BLOCK))
    pairs = blocks[..., :_HALF]
    codes = xp.concatenate([pairs & np.uint8(15), pairs >> np.uint8(4)], axis=-1)
    shifts = np.arange(8, dtype=np.uint8)
    for bit in range(4, format.bits):
        start = _HALF + (bit - 4) * BLOCK // 8
        octets = blocks[..., start : start + BLOCK // 8, None]
        ones = ((octets >> shifts) & np.uint8(1)).reshape(codes.shape)
        codes = codes | (ones << np.uint8(bit))
    return codes.reshape(*values.shape[:-1], -1)
