"""Buckets chosen from how large steps are, beside doubling ones: what they save, and the flags."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.bench.replay import at_utilisation, fit_lengths, replay, scale_lengths
from jaxserve.bench.settings import BucketsSpec
from jaxserve.bench.sides import Sides
from jaxserve.bench.step_time import LinearCost, TabledCost, measure_engine
from jaxserve.bench.tables import Result, format_table
from jaxserve.bench.workloads import WorkloadItem, load_trace
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.step_histogram import StepHistogram
from jaxserve.runner.bucket_choice import Cost, choose_buckets, expected_cost, padding_fraction
from jaxserve.runner.buckets import doubling_buckets


@dataclasses.dataclass(frozen=True)
class BucketSet:
    """Buckets and what steps cost in them.

    Attributes:
        sizes: the buckets of one data shard.
        padding: the part of what is run that is padding.
        cost: of a mean step, in tokens (or rows), or in seconds if a cost in seconds was given.
    """

    sizes: tuple[int, ...]
    padding: float
    cost: float

    @classmethod
    def of(cls, counts: Mapping[int, int], sizes: tuple[int, ...], cost: Cost) -> "BucketSet":
        """Evaluate buckets on counted steps."""
        return cls(sizes, padding_fraction(counts, sizes), expected_cost(counts, sizes, cost))


@dataclasses.dataclass(frozen=True)
class BucketChoice:
    """Doubling and chosen buckets of one kind, tokens or rows.

    Attributes:
        doubling: the default.
        chosen: the best with the programs allowed.
        by_programs: the best with fewer programs, by their number.
    """

    doubling: BucketSet
    chosen: BucketSet
    by_programs: dict[int, BucketSet]


def choose(
    counts: Mapping[int, int], limit: int, num_programs: int | None, cost: Cost = float
) -> BucketChoice:
    """Choose buckets for counted sizes.

    Args:
        counts: steps by size.
        limit: the largest size there can be.
        num_programs: buckets at most; None for as many as doubling ones.
        cost: of a step in a bucket.

    Raises:
        ConfigError: a size exceeds the limit, or no program is allowed.
    """
    doubling = doubling_buckets(limit)
    if num_programs is not None and num_programs < 1:
        raise ConfigError(f"there must be at least one program, got {num_programs}")
    if max(counts, default=0) > limit:
        raise ConfigError(
            f"a step of {max(counts)} was counted, the limit is {limit}: give the limits "
            "(--max-num-batched-tokens, --max-num-seqs) that the steps were made under"
        )
    by_programs: dict[int, BucketSet] = {}
    for number in range(1, (num_programs or len(doubling)) + 1):
        sizes = choose_buckets(counts, limit=limit, num_programs=number, cost=cost)
        by_programs[number] = BucketSet.of(counts, sizes, cost)
    return BucketChoice(
        BucketSet.of(counts, doubling, cost), by_programs[max(by_programs)], by_programs
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketReport(Result):
    """Choices for both kinds of program, of a mesh with `num_shards` data shards.

    Attributes:
        unit: of costs: tokens or seconds.
        flags: the options that make a server use the chosen buckets.
        line: what a step takes, if a trace was replayed.
    """

    num_steps: int
    num_shards: int
    unit: str
    flags: str
    tokens: BucketChoice
    rows: BucketChoice
    line: LinearCost | None = None

    def __str__(self) -> str:
        parts = [*([f"A step takes {self.line}"] if self.line else []), f"{self.num_steps} steps"]
        for name, choice, unit in (("token", self.tokens, self.unit), ("row", self.rows, "rows")):
            rows = [
                (f"doubling, {len(choice.doubling.sizes)}", *_cells(choice.doubling, unit)),
                *((f"chosen, {number}", *_cells(best, unit))
                  for number, best in choice.by_programs.items()),
            ]  # fmt: skip
            header = (f"{name} buckets", "padding", f"mean step ({_shown(unit)})")
            parts.append(format_table(header, rows))
            doubling, chosen = (
                ",".join(map(str, s.sizes)) for s in (choice.doubling, choice.chosen)
            )
            parts.append(f"doubling: {doubling}\nchosen:   {chosen}")
        return "\n\n".join([*parts, self.flags])


def _shown(unit: str) -> str:
    return "ms" if unit == "seconds" else unit


def _cells(buckets: BucketSet, unit: str) -> tuple[str, str]:
    cost = buckets.cost * 1e3 if unit == "seconds" else buckets.cost
    return f"{100 * buckets.padding:.1f} %", f"{cost:.1f}"


def choose_buckets_from_histogram(
    histogram: StepHistogram,
    *,
    max_tokens: int,
    max_rows: int,
    num_programs: int | None = None,
    num_row_programs: int | None = None,
    cost: Cost | None = None,
) -> BucketReport:
    """Choose buckets for the steps that a server counted.

    Args:
        histogram: the steps, by their fullest data shard.
        max_tokens, max_rows: limits of a step, over all data shards.
        num_programs, num_row_programs: buckets of each kind at most; None for as many as doubling
            ones.
        cost: seconds of a step in a bucket of so many tokens of one shard; None: its tokens.

    Raises:
        ConfigError: the limits do not divide over the shards, or do not hold the steps.
    """
    shards = histogram.num_shards
    if max_tokens % shards or max_rows % shards:
        raise ConfigError(f"limits {max_tokens}, {max_rows} do not divide by {shards} data shards")
    tokens = choose(histogram.tokens(), max_tokens // shards, num_programs, cost or float)
    rows = choose(histogram.sampled(), max_rows // shards, num_row_programs)
    token_buckets, row_buckets = (
        ",".join(str(size * shards) for size in choice.chosen.sizes) for choice in (tokens, rows)
    )
    return BucketReport(
        num_steps=histogram.num_steps,
        num_shards=shards,
        unit="tokens" if cost is None else "seconds",
        flags=f"--token-buckets {token_buckets} --row-buckets {row_buckets}",
        tokens=tokens,
        rows=rows,
    )


def choose_buckets_from_trace(
    items: Sequence[WorkloadItem],
    config: EngineConfig,
    line: LinearCost,
    *,
    num_programs: int | None = None,
    num_row_programs: int | None = None,
    cost: Cost | None = None,
) -> BucketReport:
    """Replay requests through the scheduler and choose buckets for the steps they make.

    Args:
        items: the requests, in order of arrival.
        config: of the engine, see `replay`.
        line: seconds of a step of so many tokens: how fast the simulated clock runs.
        num_programs, num_row_programs, cost: see `choose_buckets_from_histogram`.

    Raises:
        InvalidRequest: a request is too long for the limits.
        ConfigError: as `choose_buckets_from_histogram`.
    """
    report = choose_buckets_from_histogram(
        replay(items, config, line).steps.histogram,
        max_tokens=config.max_num_batched_tokens,
        max_rows=config.max_num_seqs,
        num_programs=num_programs,
        num_row_programs=num_row_programs,
        cost=cost,
    )
    return dataclasses.replace(report, line=line)


def measure_buckets(config: EngineConfig, spec: BucketsSpec, sides: Sides) -> BucketReport:
    """Choose buckets as the settings say, from a trace or from what was served.

    Args:
        config: the engine's limits, and the model whose steps are timed if no time is given.
        spec: see there.
        sides: runs the engine whose steps are timed.

    Raises:
        ConfigError: a file cannot be read, or the options do not fit together.
    """
    items = load_trace(spec.trace, spec.num_requests, config.seed) if spec.trace else []
    by_time = spec.cost == "time"
    measured = _measure(config, sides) if by_time or (items and spec.step_ms is None) else {}
    choice: dict[str, Any] = dict(
        num_programs=spec.num_programs,
        num_row_programs=spec.num_row_programs,
        cost=TabledCost(measured) if by_time else None,
    )
    if spec.histogram is not None:
        return choose_buckets_from_histogram(
            StepHistogram.load(spec.histogram),
            max_tokens=config.max_num_batched_tokens,
            max_rows=config.max_num_seqs,
            **choice,
        )
    if spec.step_ms is None:
        line = LinearCost.fit(measured)
    else:
        line = LinearCost(spec.step_ms[0] / 1e3, spec.step_ms[1] / 1e3)
    items = scale_lengths(items, spec.length_scale)
    longest = max(len(item.prompt_token_ids) + item.output_len for item in items)
    max_model_len = config.max_model_len or longest
    # As many pages as can be used, if the options do not say.
    pages = config.max_num_seqs * -(-max_model_len // config.page_size)
    config = dataclasses.replace(
        config, num_pages=config.num_pages or pages, max_model_len=max_model_len
    )
    items = fit_lengths(items, max_model_len)
    if spec.utilisation is not None:
        items = at_utilisation(items, spec.utilisation, config, line)
    return choose_buckets_from_trace(items, config, line, **choice)


def _measure(config: EngineConfig, sides: Sides) -> dict[int, float]:
    """Seconds of the model's steps that fill doubling buckets."""
    with sides.alone(dataclasses.replace(config, policy="fcfs")) as driver:  # none is asked
        return measure_engine(driver.engine, doubling_buckets(config.max_num_batched_tokens))
