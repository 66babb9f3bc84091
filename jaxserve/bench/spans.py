"""What a decode step takes longer when its layers are cut into spans: launching their programs."""

import contextlib
import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxserve.bench.settings import SpansSpec
from jaxserve.bench.sides import Sides
from jaxserve.bench.step_time import time_step
from jaxserve.bench.tables import Result, format_table
from jaxserve.core.config import EngineConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpansResult(Result):
    """Decode steps by the number of spans, and by rows.

    Attributes:
        step_seconds: the median step.
        added_seconds: the median, over rounds, of what a step took longer than that of the first
            number of spans in the same round.
    """

    step_seconds: dict[int, dict[int, float]]
    added_seconds: dict[int, dict[int, float]]

    def __str__(self) -> str:
        """A table; what a span adds is over the first number's step, by how many more there are."""
        base, *_ = self.step_seconds
        header = ["spans"]
        for rows in self.step_seconds[base]:
            header += [f"ms at {rows} rows", "added by a span"]
        table = []
        for spans, seconds in self.step_seconds.items():
            cells = [str(spans)]
            for rows, mine in seconds.items():
                added = 1e3 * self.added_seconds[spans][rows] / max(spans - base, 1)
                cells += [f"{1e3 * mine:.2f}", "" if spans == base else f"{added:.3f}"]
            table.append(cells)
        return format_table(header, table)


def measure_spans(config: EngineConfig, spec: SpansSpec, sides: Sides) -> SpansResult:
    """Time decode steps on engines that differ in their number of spans, and take turns."""
    rows = sorted(spec.rows)
    sizes = ",".join(map(str, rows))
    config = dataclasses.replace(
        config,
        max_num_seqs=rows[-1],
        max_num_batched_tokens=rows[-1],
        max_model_len=spec.context_len,
        num_pages=rows[-1] * -(-spec.context_len // config.page_size),
        token_buckets=sizes,
        row_buckets=sizes,
    )
    configs = {str(n): dataclasses.replace(config, num_spans=n) for n in sorted(spec.spans)}
    drivers = sides.open(configs)
    with contextlib.ExitStack() as stack:
        for driver in drivers.values():
            stack.callback(driver.engine.close)

        times: Mapping[int, Mapping[str, list[float]]] = {
            count: sides.take_turns(
                [*configs],
                spec.rounds,
                lambda name, _, n=count: time_step(drivers[name].engine, n, spec.context_len),
            )
            for count in rows
        }
    base = next(iter(configs))

    def median(name: str, count: int, less: str | None = None) -> float:
        mine = np.array(times[count][name])
        return float(np.median(mine if less is None else mine - np.array(times[count][less])))

    return SpansResult(
        step_seconds={int(n): {count: median(n, count) for count in rows} for n in configs},
        added_seconds={int(n): {count: median(n, count, base) for count in rows} for n in configs},
    )
