"""What is computed and kept for nothing: padding of steps, and KV slots without a token.

A trace, scaled to the machine, runs through the real engine once per side: with doubling buckets,
and with buckets chosen for it (by replaying another part of the trace through the scheduler, so
that they are not chosen from what they are measured on), for each page size.
"""

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.bench.buckets import BucketReport, choose_buckets_from_trace
from jaxserve.bench.replay import (
    ReplayLimits,
    StepRecorder,
    at_utilisation,
    fit_lengths,
    scale_lengths,
)
from jaxserve.bench.step_time import LinearCost, measure_engine
from jaxserve.bench.stepping import Driver, TimedRequest, greedy
from jaxserve.bench.tables import format_table
from jaxserve.bench.workloads import WorkloadItem
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.step import Executor, LoadDone, SamplingExtras, StepPlan, StepResult
from jaxserve.runner.bucket_choice import padding_fraction
from jaxserve.runner.buckets import Buckets

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaddingSpec:
    """How a trace is made to fit the machine, and what is compared on it.

    Attributes:
        num_requests: requests that are served, the trace's first.
        num_calibration: requests after those, from which the buckets are chosen.
        length_scale: by what prompts and answers are shortened.
        utilisation: load, as a part of what the engine can do.
        page_sizes: tokens per KV page; doubling buckets only run with the first.

    Raises:
        ConfigError: a value is out of range.
    """

    num_requests: int = 100
    num_calibration: int = 2000
    length_scale: float = 0.125
    utilisation: float = 0.7
    page_sizes: tuple[int, ...] = (64, 32, 16)

    def __post_init__(self) -> None:
        if self.num_requests < 2 or self.num_calibration < 2:
            raise ConfigError("there must be at least two requests of each kind")
        if not self.page_sizes:
            raise ConfigError("there must be a page size")
        if not (0 < self.length_scale <= 1 and self.utilisation > 0):
            raise ConfigError("length_scale must be in (0, 1], utilisation positive")


@dataclasses.dataclass(frozen=True)
class PaddingRun:
    """One side: fractions in [0, 1), latencies in seconds.

    Attributes:
        name: doubling or chosen.
        page_size: tokens per KV page.
        token_buckets, row_buckets: what steps were padded to.
        num_steps: steps run.
        padding: of the tokens run, those that are padding.
        row_padding: of the rows sampled, those that are padding.
        unused_kv: of the KV slots in pages of running requests, those without a token.
        mean_ttft, mean_latency: from when a request was due.
    """

    name: str
    page_size: int
    token_buckets: tuple[int, ...]
    row_buckets: tuple[int, ...]
    num_steps: int
    padding: float
    row_padding: float
    unused_kv: float
    mean_ttft: float
    mean_latency: float


@dataclasses.dataclass(frozen=True)
class PaddingResult:
    """All sides, how the buckets were chosen, and what the trace was made to be."""

    runs: tuple[PaddingRun, ...]
    choice: BucketReport
    cost: LinearCost
    num_input_tokens: int
    num_output_tokens: int
    span: float

    def to_dict(self) -> dict[str, Any]:
        """JSON fields."""
        return {
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "flags": self.choice.flags,
            "step_base_seconds": self.cost.base,
            "step_seconds_per_token": self.cost.per_token,
            "num_input_tokens": self.num_input_tokens,
            "num_output_tokens": self.num_output_tokens,
            "arrival_span": self.span,
        }

    def __str__(self) -> str:
        header = ("buckets", "page", "steps", "padding", "padded rows", "unused KV",
                  "mean TTFT (s)", "mean latency (s)")  # fmt: skip
        rows = [
            (run.name, str(run.page_size), str(run.num_steps), f"{100 * run.padding:.1f} %",
             f"{100 * run.row_padding:.1f} %", f"{100 * run.unused_kv:.1f} %",
             f"{run.mean_ttft:.2f}", f"{run.mean_latency:.2f}")
            for run in self.runs
        ]  # fmt: skip
        return (
            f"{self.num_input_tokens} tokens in, {self.num_output_tokens} out, arriving over "
            f"{self.span:.0f} s; a step takes about {self.cost.base * 1e3:.1f} ms + "
            f"{self.cost.per_token * 1e3:.2f} ms per token\n"
            f"{format_table(header, rows)}\n{self.choice.flags}"
        )


class RecordingExecutor:
    """Passes everything on to another executor and notes the steps.

    Args:
        executor: the one that runs them.
        page_size: tokens per KV page.

    Attributes:
        steps: what was launched.
    """

    def __init__(self, executor: Executor, page_size: int) -> None:
        self.steps = StepRecorder(page_size)
        self._executor = executor

    def launch(self, plan: StepPlan) -> Any:
        """Note the step and start it."""
        self.steps.add(plan)
        return self._executor.launch(plan)

    def sample(self, handle: Any, extras: Mapping[int, SamplingExtras]) -> None:
        """See `Executor`."""
        self._executor.sample(handle, extras)

    def score(
        self, hidden: np.ndarray, token_ids: Sequence[int], num_top: int
    ) -> list[TokenLogprobs]:
        """See `Executor`."""
        return self._executor.score(hidden, token_ids, num_top)

    def collect(self, handle: Any) -> StepResult:
        """Wait for a launched step."""
        return self._executor.collect(handle)

    def poll(self, *, wait: bool = False) -> list[LoadDone]:
        """The loads that came to an end."""
        return self._executor.poll(wait=wait)

    def close(self) -> None:
        """End the executor."""
        self._executor.close()


def record_steps(engine: "Engine") -> StepRecorder:
    """Note every step that an engine launches from now on."""
    recording = RecordingExecutor(engine.executor, engine.info.page_size)
    engine.executor = recording  # the loop knows its executor only by its protocol
    return recording.steps


def measure_padding(
    config: EngineConfig,
    items: Sequence[WorkloadItem],
    spec: PaddingSpec,
    build: Callable[[EngineConfig], "Engine"],
    *,
    progress: bool = True,
) -> PaddingResult:
    """Serve the scaled trace with doubling and with chosen buckets.

    Args:
        config: of the engine; its buckets and page size are this benchmark's to choose.
        items: the trace, at least `spec.num_requests` + 2 requests, in order of arrival.
        spec: see there.
        build: makes an engine.
        progress: show bars on stderr.

    Raises:
        ConfigError: the trace is too short, or the options do not fit together.
    """
    if len(items) < spec.num_requests + 2:
        raise ConfigError(f"the trace has {len(items)} requests, which leaves none to choose from")
    first = dataclasses.replace(
        config, page_size=spec.page_sizes[0], token_buckets=None, row_buckets=None
    )
    engine = build(first)
    sizes = Buckets.of_config(first, max_model_len=engine.info.max_model_len).tokens
    cost = LinearCost.fit(measure_engine(engine, sizes))
    info = engine.info
    limits = ReplayLimits.of_config(
        first, num_pages=info.num_pages, max_model_len=info.max_model_len
    )
    scaled = fit_lengths(scale_lengths(items, spec.length_scale), info.max_model_len)
    served, others = (
        at_utilisation(part, spec.utilisation, limits, cost)
        for part in (scaled[: spec.num_requests], scaled[spec.num_requests :])
    )
    choice = choose_buckets_from_trace(others, limits, cost, cost=float)
    runs = [_run("doubling", first, engine, served, progress)]
    for page_size in spec.page_sizes:
        del engine  # two pools may not fit beside each other
        gc.collect()
        chosen = dataclasses.replace(
            config,
            page_size=page_size,
            token_buckets=",".join(map(str, choice.tokens.chosen.sizes)),
            row_buckets=",".join(map(str, choice.rows.chosen.sizes)),
        )
        engine = build(chosen)
        runs.append(_run("chosen", chosen, engine, served, progress))
    return PaddingResult(
        tuple(runs), choice, cost, sum(len(item.prompt_token_ids) for item in served),
        sum(item.output_len for item in served), served[-1].arrival or 0.0,
    )  # fmt: skip


def _run(
    name: str,
    config: EngineConfig,
    engine: "Engine",
    items: Sequence[WorkloadItem],
    progress: bool,
) -> PaddingRun:
    steps, buckets = (
        record_steps(engine),
        Buckets.of_config(config, max_model_len=engine.info.max_model_len),
    )
    requests = [
        TimedRequest(
            request_id=str(index),
            prompt_token_ids=item.prompt_token_ids.tolist(),
            params=greedy(item.output_len),
            arrival=item.arrival or 0.0,
        )
        for index, item in enumerate(items)
    ]
    title = f"{name}, pages of {config.page_size}" if progress else None
    driver = Driver(engine)
    driver.run(requests, progress=title)
    records = driver.records.values()
    engine.close()
    return PaddingRun(
        name,
        config.page_size,
        buckets.tokens,
        buckets.sampled,
        steps.histogram.num_steps,
        padding_fraction(steps.histogram.tokens(), buckets.tokens),
        padding_fraction(steps.histogram.sampled(), buckets.sampled),
        steps.unused_kv_fraction,
        float(np.mean([r.delta_times[0] - r.start for r in records])),
        float(np.mean([r.delta_times[-1] - r.start for r in records])),
    )
