"""What padding costs in time: steps as they are padded, beside those of buckets just their size."""

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np

from jaxserve.bench.sides import Sides
from jaxserve.bench.step_time import time_step
from jaxserve.core.config import EngineConfig

NUM_SIZES = 6  # each takes a program of its own
ROUNDS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaddedStep:
    """A size that stands for some of the steps; seconds are medians.

    Attributes:
        tokens: of the step.
        bucket: that it was padded to.
        num_steps: that it stands for.
        padded_seconds: in that bucket.
        exact_seconds: in a bucket of its own size.
    """

    tokens: int
    bucket: int
    num_steps: int
    padded_seconds: float
    exact_seconds: float

    @property
    def ratio(self) -> float:
        """Padded over exact."""
        return self.padded_seconds / self.exact_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaddingTime:
    """What padding costs a workload in time.

    Attributes:
        steps: the sizes measured.
        fraction: of the time of all its steps, what padding takes.
    """

    steps: tuple[PaddedStep, ...]
    fraction: float

    def __str__(self) -> str:
        sizes = ", ".join(f"{one.tokens} in {one.bucket}: {one.ratio:.2f}" for one in self.steps)
        return (
            f"padding takes {100 * self.fraction:.1f} % of the steps' time; "
            f"steps beside those of a bucket just their size: {sizes}"
        )


def representatives(counts: Mapping[int, int], number: int) -> dict[int, int]:
    """Sizes that stand for all: medians of runs of about equally many steps, and how many.

    Args:
        counts: steps by size.
        number: of sizes, at most.
    """
    sizes = sorted(size for size, count in counts.items() if size and count)
    ends = np.cumsum([counts[size] for size in sizes])
    # A size belongs to the run that its middle step falls into.
    middles = ends - np.array([counts[size] for size in sizes]) / 2
    runs = np.minimum(middles / ends[-1] * number, number - 1).astype(int)
    chosen: dict[int, int] = {}
    for _, group in itertools.groupby(zip(runs, sizes, strict=True), key=lambda pair: pair[0]):
        mine = [size for _, size in group]
        total = sum(counts[size] for size in mine)
        reached = np.cumsum([counts[size] for size in mine])
        chosen[mine[int(np.searchsorted(reached, total / 2))]] = total
    return chosen


def measure_padding_time(
    config: EngineConfig,
    counts: Mapping[int, int],
    buckets: tuple[int, ...],
    context_len: int,
    sides: Sides,
) -> PaddingTime:
    """Measure steps of a workload's sizes in its buckets, and in buckets just their size.

    Args:
        config: of the engine that ran it, with as many pages as its rows take.
        counts: its steps by tokens, at least one.
        buckets: they were padded to.
        context_len: of rows, in tokens.
        sides: builds the engines, which take turns.
    """
    sizes = representatives(counts, NUM_SIZES)
    exact = dataclasses.replace(
        config, token_buckets=",".join(map(str, sorted({*sizes, max(buckets)})))
    )
    drivers = sides.open({"padded": config, "exact": exact})
    try:
        times = sides.take_turns(
            list(itertools.product(sizes, drivers)),
            ROUNDS,
            lambda side, _: time_step(drivers[side[1]].engine, side[0], context_len),
        )
    finally:
        for driver in drivers.values():
            driver.engine.close()
    steps = tuple(
        PaddedStep(
            tokens=size,
            bucket=next(bucket for bucket in buckets if bucket >= size),
            num_steps=count,
            padded_seconds=float(np.median(times[size, "padded"])),
            exact_seconds=float(np.median(times[size, "exact"])),
        )
        for size, count in sizes.items()
    )
    padded = sum(one.num_steps * one.padded_seconds for one in steps)
    plain = sum(one.num_steps * one.exact_seconds for one in steps)
    return PaddingTime(steps=steps, fraction=1 - plain / padded)
