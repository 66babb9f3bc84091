"""What is computed and kept for nothing: padding of steps, and KV slots without a token.

A trace, scaled to the machine, runs through the real engine once per side: with doubling buckets,
and with buckets chosen for it (by replaying another part of the trace through the scheduler, so
that they are not chosen from what they are measured on), for each page size.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.bench.buckets import BucketReport, choose_buckets_from_trace
from jaxserve.bench.padding_time import PaddingTime, measure_padding_time
from jaxserve.bench.replay import StepRecorder, at_utilisation, fit_lengths, scale_lengths
from jaxserve.bench.settings import PaddingSpec
from jaxserve.bench.sides import Sides, differing_answers, identity
from jaxserve.bench.step_time import LinearCost, measure_engine
from jaxserve.bench.stepping import Driver, TimedRequest, greedy
from jaxserve.bench.tables import Result, format_table
from jaxserve.bench.workloads import WorkloadItem
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.step import Executor, StepPlan
from jaxserve.runner.bucket_choice import padding_fraction
from jaxserve.runner.buckets import Buckets

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine


@dataclasses.dataclass(frozen=True)
class PaddingRun:
    """One side: fractions in [0, 1), latencies in seconds.

    Attributes:
        name: doubling or chosen.
        page_size: tokens per KV page.
        token_buckets, row_buckets: what steps were padded to.
        step_tokens: steps run, by their tokens.
        padding: of the tokens run, those that are padding.
        row_padding: of the rows sampled, those that are padding.
        unused_kv: of the KV slots in pages of running requests, those without a token.
        mean_ttft, mean_latency: from when a request was due.
    """

    name: str
    page_size: int
    token_buckets: tuple[int, ...]
    row_buckets: tuple[int, ...]
    step_tokens: dict[int, int]
    padding: float
    row_padding: float
    unused_kv: float
    mean_ttft: float
    mean_latency: float

    @property
    def num_steps(self) -> int:
        """Steps run."""
        return sum(self.step_tokens.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaddingResult(Result):
    """All sides, how the buckets were chosen, and what the trace was made to be.

    Attributes:
        flags: the chosen buckets as options.
        step_base_seconds, step_seconds_per_token: of the line that steps' times are taken for.
        arrival_span: seconds over which the requests arrive.
        differing_answers: of the later runs, beside the first one's.
        time: what padding takes with doubling buckets.
    """

    runs: tuple[PaddingRun, ...]
    choice: BucketReport
    flags: str
    step_base_seconds: float
    step_seconds_per_token: float
    num_input_tokens: int
    num_output_tokens: int
    arrival_span: float
    num_answers: int
    differing_answers: int
    time: PaddingTime

    def __str__(self) -> str:
        header = ("buckets", "page", "steps", "padding", "padded rows", "unused KV",
                  "mean TTFT (s)", "mean latency (s)")  # fmt: skip
        rows = [
            (run.name, str(run.page_size), str(run.num_steps), f"{100 * run.padding:.1f} %",
             f"{100 * run.row_padding:.1f} %", f"{100 * run.unused_kv:.1f} %",
             f"{run.mean_ttft:.2f}", f"{run.mean_latency:.2f}")
            for run in self.runs
        ]  # fmt: skip
        same = identity(self.differing_answers, self.num_answers * (len(self.runs) - 1))
        return (
            f"{self.num_input_tokens} tokens in, {self.num_output_tokens} out, arriving over "
            f"{self.arrival_span:.0f} s; a step takes about {self.choice.line}\n"
            f"{format_table(header, rows)}\n"
            f"doubling buckets: {self.time}\n"
            f"answers beside the first run's: {same}\n{self.flags}"
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

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)


def record_steps(engine: "Engine") -> StepRecorder:
    """Note every step that an engine launches from now on."""
    recording: Any = RecordingExecutor(engine.executor, engine.info.page_size)
    engine.executor = recording  # the loop knows its executor only by its protocol
    return recording.steps


def measure_padding(
    config: EngineConfig, items: Sequence[WorkloadItem], spec: PaddingSpec, sides: Sides
) -> PaddingResult:
    """Serve the scaled trace with doubling and with chosen buckets.

    Args:
        config: of the engine; its buckets and page size are this benchmark's to choose.
        items: the trace, at least `spec.num_requests` + 2 requests, in order of arrival.
        spec: see there.
        sides: runs the engines, one after the other.

    Raises:
        ConfigError: the trace is too short, or the options do not fit together.
    """
    if len(items) < spec.num_requests + 2:
        raise ConfigError(f"the trace has {len(items)} requests, which leaves none to choose from")
    first = dataclasses.replace(
        config, page_size=spec.page_sizes[0], token_buckets=None, row_buckets=None
    )
    answers: dict[str, list[list[int]]] = {}
    with sides.alone(first) as driver:
        info = driver.engine.info
        sizes = Buckets.of_config(first, max_model_len=info.max_model_len).tokens
        line = LinearCost.fit(measure_engine(driver.engine, sizes))
        resolved = dataclasses.replace(
            first, num_pages=info.num_pages, max_model_len=info.max_model_len
        )
        scaled = fit_lengths(scale_lengths(items, spec.length_scale), info.max_model_len)
        served, others = (
            at_utilisation(part, spec.utilisation, resolved, line)
            for part in (scaled[: spec.num_requests], scaled[spec.num_requests :])
        )
        choice = choose_buckets_from_trace(others, resolved, line, cost=float)
        runs = [_run("doubling", first, driver, served, sides, answers)]
    for page_size in spec.page_sizes:
        chosen = dataclasses.replace(
            config,
            page_size=page_size,
            token_buckets=",".join(map(str, choice.tokens.chosen.sizes)),
            row_buckets=",".join(map(str, choice.rows.chosen.sizes)),
        )
        del driver  # two pools may not fit beside each other
        with sides.alone(chosen) as driver:
            runs.append(_run("chosen", chosen, driver, served, sides, answers))
    del driver
    context_len = int(np.mean([len(i.prompt_token_ids) + i.output_len / 2 for i in served]))
    pages = first.max_num_seqs * -(-context_len // first.page_size)
    small = dataclasses.replace(resolved, num_pages=min(pages, info.num_pages))
    time = measure_padding_time(
        small, runs[0].step_tokens, runs[0].token_buckets, context_len, sides
    )
    return PaddingResult(
        runs=tuple(runs),
        choice=choice,
        flags=choice.flags,
        step_base_seconds=line.base,
        step_seconds_per_token=line.per_token,
        num_input_tokens=sum(len(item.prompt_token_ids) for item in served),
        num_output_tokens=sum(item.output_len for item in served),
        arrival_span=served[-1].arrival or 0.0,
        num_answers=len(served),
        differing_answers=sum(differing_answers(answers).values()),
        time=time,
    )


def _run(
    name: str,
    config: EngineConfig,
    driver: Driver,
    items: Sequence[WorkloadItem],
    sides: Sides,
    answers: dict[str, list[list[int]]],
) -> PaddingRun:
    engine = driver.engine
    steps = record_steps(engine)
    buckets = Buckets.of_config(config, max_model_len=engine.info.max_model_len)
    start = driver.now()
    requests = [
        TimedRequest(
            request_id=str(index),
            prompt_token_ids=item.prompt_token_ids.tolist(),
            params=greedy(item.output_len),
            arrival=start + (item.arrival or 0.0),
        )
        for index, item in enumerate(items)
    ]
    title = f"{name}, pages of {config.page_size}"
    records = driver.run(requests, progress=sides.title(title)).records
    answers[title] = [driver.records[request.request_id].token_ids for request in requests]
    return PaddingRun(
        name,
        config.page_size,
        buckets.tokens,
        buckets.sampled,
        dict(steps.histogram.tokens()),
        padding_fraction(steps.histogram.tokens(), buckets.tokens),
        padding_fraction(steps.histogram.sampled(), buckets.sampled),
        steps.unused_kv_fraction,
        float(np.mean([r.delta_times[0] - r.start for r in records])),
        float(np.mean([r.delta_times[-1] - r.start for r in records])),
    )
