"""Which data a compiled program moves between devices, read off the program itself."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from jax.stages import Compiled

_KINDS = (
    "all-reduce", "all-gather", "all-to-all", "ragged-all-to-all", "collective-broadcast",
    "collective-permute", "reduce-scatter", "send", "recv",
)  # fmt: skip
# `%name = TYPE opcode(operands), ...`; asynchronous ones are pairs of -start and -done.
_INSTRUCTION = re.compile(
    rf"^\s*(?:ROOT )?%?\S+ = (?P<type>\(.*?\)|\S+) (?P<kind>{'|'.join(_KINDS)})"
    r"(?P<phase>-start|-done)?\("
)
# What a computation calls unconditionally: fusions, and what runs on a TPU's SparseCores.
_CALLS = re.compile(r"(?:to_apply|calls|called_computations)=\{?((?:%[^\s,{}]+(?:, )?)+)")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One array that one collective operation produces on every device.

    Attributes:
        kind: XLA's name, such as "all-reduce".
        dtype: XLA's name, such as "bf16".
        shape: of the result.
        once: it runs once each time the program does; others are in loops and branches.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    once: bool

    @property
    def size(self) -> int:
        """Elements of the result."""
        return math.prod(self.shape)


def collectives(compiled: Compiled) -> list[Collective]:
    """Every collective of a compiled program; one that XLA combined counts once per array."""
    computations = _computations(compiled.as_text() or "")
    once, pending = set[str](), ["ENTRY"]
    while pending:
        name = pending.pop()
        if name not in once:
            once.add(name)
            calls = (_CALLS.findall(line) for line in computations.get(name, []))
            pending += [callee for call in calls for names in call for callee in names.split(", ")]
    return [
        Collective(kind, dtype, shape, name in once)
        for name, lines in computations.items()
        for line in lines
        for kind, dtype, shape in _arrays(line)
    ]


def _computations(text: str) -> dict[str, list[str]]:
    """A program's text by computation; the main one is called "ENTRY"."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.endswith("{"):
            lines = computations.setdefault(line.split(maxsplit=1)[0], [])
        else:
            lines.append(line)
    return computations


def _arrays(line: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Kind, type and shape of every array that an instruction brings from other devices."""
    match = _INSTRUCTION.match(line)
    if match is None or match["phase"] == "-done":
        return
    arrays = _ARRAY.findall(match["type"])
    if match["phase"] == "-start" and match["kind"] != "all-reduce":
        # Operands, results, and scalars of its own: the results are what counts.
        arrays = [array for array in arrays if array[1]]
        arrays = arrays[len(arrays) // 2 :]
    for dtype, shape in arrays:
        yield match["kind"], dtype, tuple(int(n) for n in shape.split(",") if n)
