"""Which data a compiled program moves between devices, read off the program itself."""

import math
import re
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
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One array that one collective operation produces on every device.

    Attributes:
        kind: XLA's name, such as "all-reduce".
        dtype: XLA's name, such as "bf16".
        shape: of the result.
        computation: the computation it is in: "ENTRY" runs once a step, others (bodies of
            loops and branches) any number of times.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    computation: str

    @property
    def size(self) -> int:
        """Elements of the result."""
        return math.prod(self.shape)


def collectives(compiled: Compiled) -> list[Collective]:
    """Every collective of a compiled program; one that XLA combined counts once per array."""
    found: list[Collective] = []
    computation = ""
    for line in (compiled.as_text() or "").splitlines():
        if line.startswith(("%", "ENTRY")) and line.endswith("{"):
            computation = line.split(maxsplit=1)[0]
        match = _INSTRUCTION.match(line)
        if match is None or match["phase"] == "-done":
            continue
        arrays = _ARRAY.findall(match["type"])
        if match["phase"] == "-start" and match["kind"] != "all-reduce":
            # Operands, results, and scalars of its own: the results are what counts.
            arrays = [array for array in arrays if array[1]]
            arrays = arrays[len(arrays) // 2 :]
        for dtype, shape in arrays:
            sizes = tuple(int(n) for n in shape.split(",") if n)
            found.append(Collective(match["kind"], dtype, sizes, computation))
    return found
