"""How long the device takes for a step of so many tokens: measured, tabled, or as a line."""

import contextlib
import dataclasses
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxserve.bench.settings import StepsSpec
from jaxserve.bench.sides import Sides
from jaxserve.bench.tables import Result, format_table
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.step import Executor, StepPlan, StepRow

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine

NUM_REPEATS = 5


@dataclasses.dataclass(frozen=True)
class LinearCost:
    """Seconds of a step of t tokens: base + t * per_token.

    Raises:
        ConfigError: a step would take no time, or less with more tokens.
    """

    base: float
    per_token: float

    def __post_init__(self) -> None:
        if not (self.base >= 0 and self.per_token >= 0 and self.base + self.per_token > 0):
            raise ConfigError(
                f"a step must take time, got {self.base} s and {self.per_token} s per token"
            )

    def __str__(self) -> str:
        return f"{self.base * 1e3:.1f} ms + {self.per_token * 1e3:.3f} ms per token"

    def __call__(self, tokens: int) -> float:
        """Seconds of a step of `tokens` tokens."""
        return self.base + tokens * self.per_token

    @classmethod
    def fit(cls, seconds: Mapping[int, float]) -> "LinearCost":
        """The line nearest to measured steps, by least squares of the relative errors."""
        tokens, times = np.array(list(seconds), float), np.array(list(seconds.values()))
        design = np.stack([np.ones_like(tokens), tokens], axis=1) / times[:, None]
        base, slope = np.linalg.lstsq(design, np.ones_like(times), rcond=None)[0]
        return cls(max(0.0, float(base)), max(0.0, float(slope)))


class TabledCost:
    """Seconds of a step by measured points, straight lines between them, never falling.

    Args:
        seconds: by number of tokens, at least one.
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self._tokens = np.array(sorted(seconds), float)
        self._seconds = np.maximum.accumulate([seconds[n] for n in sorted(seconds)])

    def __call__(self, tokens: int) -> float:
        """Seconds of a step of `tokens` tokens; beyond the table, its nearest end's."""
        return float(np.interp(tokens, self._tokens, self._seconds))


def measure_steps(
    executor: Executor,
    sizes: Sequence[int],
    *,
    max_rows: int,
    page_size: int,
    num_pages: int,
    context_len: int,
    repeats: int = NUM_REPEATS,
) -> dict[int, float]:
    """Median seconds of steps that fill their bucket, each launched and waited for.

    A step of t tokens has min(t, max_rows) rows that sample greedily, as equal as possible. Their
    pages go round the pool: a pool too small for all of them is shared, which costs as many bytes.

    Args:
        executor: of one data shard; what is in its KV pool is overwritten.
        sizes: tokens per step, each at most the executor's largest bucket.
        max_rows, page_size, num_pages: the executor's limits.
        context_len: tokens of every row, those of the step included; at most the model's.
        repeats: timed runs of each size, after one that is not.
    """
    seconds = {}
    for size in sizes:
        plan = _full_step(size, min(size, max_rows), page_size, num_pages, context_len)
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            executor.collect(executor.launch(plan))
            times.append(time.perf_counter() - start)
        seconds[size] = float(np.median(times[1:]))
    return seconds


def measure_engine(
    engine: "Engine", sizes: Sequence[int], context_len: int = 256, repeats: int = NUM_REPEATS
) -> dict[int, float]:
    """`measure_steps` of an idle engine that has served nothing yet: cached KV would be lost."""
    info = engine.info
    return measure_steps(
        engine.executor,  # a step that no scheduler planned
        sizes,
        max_rows=info.max_num_seqs,
        page_size=info.page_size,
        num_pages=info.num_pages,
        context_len=min(context_len, info.max_model_len),
        repeats=repeats,
    )


def time_step(engine: "Engine", tokens: int, context_len: int) -> float:
    """Seconds of one step, after one that is not timed: a turn of engines that take turns."""
    return measure_engine(engine, [tokens], context_len, repeats=1)[tokens]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsResult(Result):
    """Median seconds of decode steps, by rows and by their context."""

    step_seconds: dict[int, dict[int, float]]

    def __str__(self) -> str:
        """A table; shares are of a step, over that of context 1."""
        contexts = [context for context in next(iter(self.step_seconds.values())) if context > 1]
        header = ["rows", "ms at context 1"]
        for context in contexts:
            header += [f"at {context}", "attention"]
        table = []
        for rows, mine in self.step_seconds.items():
            cells = [str(rows), f"{1e3 * mine[1]:.1f}"]
            for context in contexts:
                cells += [f"{1e3 * mine[context]:.1f}", f"{1 - mine[1] / mine[context]:.0%}"]
            table.append(cells)
        return format_table(header, table)


def measure_steps_by_context(config: EngineConfig, spec: StepsSpec, sides: Sides) -> StepsResult:
    """Time decode steps on an engine of their own; context 1 attends to nothing else."""
    contexts, rows = sorted({1, *spec.context_lens}), sorted(spec.rows)
    sizes = ",".join(map(str, rows))
    config = dataclasses.replace(
        config,
        max_num_seqs=rows[-1],
        max_num_batched_tokens=rows[-1],
        max_model_len=contexts[-1],
        num_pages=rows[-1] * -(-contexts[-1] // config.page_size),  # no row shares another's
        token_buckets=sizes,
        row_buckets=sizes,
    )
    with sides.alone(config) as driver, busy_processes(spec.beside_busy):
        return StepsResult(
            step_seconds=measure_contexts(driver.engine, rows, contexts, spec.rounds, sides)
        )


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many other processes each want a core meanwhile, and do nothing with it."""
    busy = [sys.executable, "-S", "-c", "while True: pass"]
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(count):
            processes.append(stack.enter_context(subprocess.Popen(busy)))
            stack.callback(processes[-1].kill)  # before it is waited for
        yield processes


def measure_contexts(
    engine: "Engine",
    rows: Sequence[int],
    context_lens: Sequence[int],
    rounds: int,
    sides: Sides,
) -> dict[int, dict[int, float]]:
    """Median seconds of decode steps, by rows and by their context; the contexts take turns.

    Args:
        engine: idle, and one that has served nothing yet.
        rows: that decode one token each.
        context_lens: tokens of every row, that one included; 1 is what a step takes that attends
            to nothing else.
        rounds: of turns, of which each is one timed step after one that is not.
        sides: whose turns they are.
    """
    seconds = {}
    for count in rows:
        times = sides.take_turns(
            context_lens, rounds,
            lambda context, _, n=count: time_step(engine, n, context),
        )  # fmt: skip
        seconds[count] = {context: float(np.median(mine)) for context, mine in times.items()}
    return seconds


def _full_step(
    tokens: int, num_rows: int, page_size: int, num_pages: int, context_len: int
) -> StepPlan:
    rows, params, page = [], SamplingParams(temperature=0), 0
    for index in range(num_rows):
        share = tokens // num_rows + (index < tokens % num_rows)
        end = max(share, context_len)
        pages = -(-end // page_size)
        rows.append(
            StepRow(
                key=index, slot=index, shard=0, start=end - share, num_tokens=share,
                token_ids=(0,) * share,
                page_ids=tuple((page + i) % num_pages for i in range(pages)),
                samples=True, params=params, seed=index,
            )
        )  # fmt: skip
        page += pages
    return StepPlan(tuple(rows))
