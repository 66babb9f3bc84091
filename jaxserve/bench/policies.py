"""One bursty trace of real prompts under every policy, at a given share of the capacity.

The requests are chat prompts that the model answers as long as it likes, greedily, up to a
limit. Most ask for a little (a fact, a sum), some for a lot (a story, code), so lengths differ
widely and can be learned from prompts. The run goes as follows:

1. First pass: all prompts at once under `fcfs`. It gives every answer's true length, and the
   capacity: answer tokens per second while requests are waiting (so the batch is full), divided
   by the mean answer.
2. Learned predictors: each learns from other prompts, answered beforehand, and is kept in a
   directory of its own.
3. Every side serves the same trace: the prompts in the same order, with gamma-distributed gaps
   (burstiness below 1 comes in bursts) at the given share of the capacity. Time is real; each
   side is an engine of its own that finds nothing cached.
4. The first pass once more: if it is not as fast as before, the machine was not steady.

A side is `POLICY` or `POLICY:PREDICTOR`. Under `oracle` a request's `max_tokens` is its true
length, which that predictor takes for the prediction; on all other sides it is the limit, so that
no policy can read a length from it. The answers are the same either way, and are compared.

Half of the requests, drawn at random, are interactive: a tight TTFT target, and priority 0. The
others have a target ten times as long, and priority 1. All have the same TPOT target, by default
about how fast people read: five tokens per second, as Andes (Liu et al., 2024) has it, so a
stream may rest for a while that has run ahead of its reader. Figures:

* latency: from when a request was due to its last token. TTFT: to its first one.
* tau: Kendall's tau of the predictions made at arrival and the answers' true lengths.
* SLO attainment: share of all requests whose TTFT and TPOT (mean time per token after the first)
  both meet their targets. One that was given up met none, and has no latency.

With many slots the queue moves into the batch and there is nothing left to order, so
`max_num_seqs` is small here: as on a server whose batch is full.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.bench.load import arrival_times
from jaxserve.bench.prompt_mix import mix_prompts
from jaxserve.bench.prompts import tokenize_prompts
from jaxserve.bench.settings import LEARNED, PoliciesSpec, side_options
from jaxserve.bench.sides import Sides, differing_answers, identity, ttfts
from jaxserve.bench.stepping import RunResult, SteppedRecord, TimedRequest
from jaxserve.bench.tables import Result, tabulate
from jaxserve.bench.workloads import WorkloadItem
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import JaxserveError
from jaxserve.core.request import FinishReason
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams

LESSON_SLOTS = 4  # times the slots of the sides
RELAXED = 10.0  # times the tight TTFT target


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyFigures:
    """One side's figures; see the module. Of predictions there are none without a predictor.

    Attributes:
        of_first_side: its mean latency, of the first side's.
        differing_answers: of `num_answers` that are complete, those that the first pass had not.
    """

    mean_latency: float
    p99_latency: float
    mean_ttft: float
    p99_ttft: float
    slo_attainment: float
    ttft_attainment: float
    tpot_attainment: float
    interactive_slo_attainment: float
    shed: int
    duration: float
    output_throughput: float
    latencies: list[float]
    ttfts: list[float]
    preemptions: int
    prediction_mae: float | None
    prediction_kendall_tau: float | None
    num_answers: int
    differing_answers: int
    of_first_side: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoliciesResult(Result):
    """All sides by name, and what the first pass said.

    Attributes:
        capacity, rate: requests per second.
        output_lens: true lengths, in tokens.
        repeated_first_pass: its duration, of that of the first.
    """

    spec: PoliciesSpec
    sides: dict[str, PolicyFigures]
    num_requests: int
    capacity: float
    rate: float
    output_lens: list[int]
    repeated_first_pass: float

    def __str__(self) -> str:
        spec, sides, lens = self.spec, self.sides, self.output_lens
        table = tabulate("policy", sides, {
            "mean latency s": lambda side: f"{side.mean_latency:.2f}",
            f"of {spec.sides[0]}'s": lambda side: f"{side.of_first_side:.2f}",
            "p99 s": lambda side: f"{side.p99_latency:.2f}",
            "mean TTFT s": lambda side: f"{side.mean_ttft:.2f}",
            "p99 TTFT s": lambda side: f"{side.p99_ttft:.2f}",
            "SLO met": lambda side: f"{side.slo_attainment:.0%}",
            "interactive": lambda side: f"{side.interactive_slo_attainment:.0%}",
            "preempted": lambda side: side.preemptions,
            "shed": lambda side: side.shed,
            "output tokens/s": lambda side: f"{side.output_throughput:.1f}",
            "tau": lambda side: (
                "-" if (tau := side.prediction_kendall_tau) is None else f"{tau:.2f}"
            ),
        })  # fmt: skip
        same = identity(
            sum(side.differing_answers for side in sides.values()),
            sum(side.num_answers for side in sides.values()),
        )
        return (
            f"{self.num_requests} requests at {self.rate:.2f} per second, {spec.load:.2f} of the "
            f"capacity of {self.capacity:.2f}; gaps of shape {spec.burstiness:g}\n"
            f"answers of {min(lens)} to {max(lens)} tokens, mean {np.mean(lens):.0f}, median "
            f"{np.median(lens):.0f}\n"
            f"targets: TTFT {spec.ttft_target:g} s (interactive half) or "
            f"{RELAXED * spec.ttft_target:g} s, TPOT {1000 * spec.tpot_target:g} ms\n"
            f"{table}\n"
            f"{same}; the first pass took {self.repeated_first_pass:.2f} times as long when it "
            f"was repeated at the end"
        )


def measure_policies(config: EngineConfig, spec: PoliciesSpec, sides: Sides) -> PoliciesResult:
    """Draw the prompts, and run everything on them; see the module."""
    mix = mix_prompts(spec.num_requests + spec.num_lessons, spec.long_share, seed=spec.seed)
    prompts = tokenize_prompts(config, mix)
    served, lessons = prompts[: spec.num_requests], prompts[spec.num_requests :]
    with tempfile.TemporaryDirectory(prefix="jaxserve-predictors-") as directory:
        return PolicyBench(config, spec, served, lessons, Path(directory), sides).run()


@dataclasses.dataclass(frozen=True)
class FirstPass:
    """What is known before the sides run.

    Attributes:
        records: one per prompt, in their order.
        capacity: requests per second.
        duration: seconds of the whole pass.
    """

    records: tuple[SteppedRecord, ...]
    capacity: float
    duration: float


class PolicyBench:
    """Runs first passes, lessons and sides; see the module.

    Args:
        config: the engine's options; policy, predictor and pool are set here.
        spec: the trace and its sides.
        prompts: token ids of the prompts that are served.
        lessons: those that predictors learn from before.
        directory: where predictors keep what they learned.
        sides: runs the engines.
    """

    def __init__(
        self,
        config: EngineConfig,
        spec: PoliciesSpec,
        prompts: Sequence[Sequence[int]],
        lessons: Sequence[Sequence[int]],
        directory: Path,
        sides: Sides,
    ) -> None:
        longest = max(map(len, [*prompts, *lessons])) + spec.max_output_len
        pages = config.max_num_seqs * -(-longest // config.page_size)
        self._config = dataclasses.replace(
            config,
            max_model_len=longest,
            # Room for those displaced, too: policies are compared here, not preemption.
            num_pages=config.num_pages or LESSON_SLOTS * pages,
            max_waiting=max(config.max_waiting, len(prompts), len(lessons)),
        )
        self._spec, self._prompts, self._lessons = spec, prompts, lessons
        self._directory, self._sides = directory, sides

    def run(self) -> PoliciesResult:
        """Everything, in order."""
        spec = self._spec
        first = self.first_pass()
        rate = spec.load * first.capacity
        wanted = {side_options(side)["length_predictor"] for side in spec.sides}
        for predictor in LEARNED:
            if predictor in wanted:
                self.teach(predictor)
        sides = {side: self.run_side(side, first, rate) for side in spec.sides}
        again = self.first_pass()
        base = sides[spec.sides[0]].mean_latency
        return PoliciesResult(
            spec=spec,
            sides={
                name: dataclasses.replace(side, of_first_side=side.mean_latency / base)
                for name, side in sides.items()
            },
            num_requests=len(self._prompts),
            capacity=first.capacity,
            rate=rate,
            output_lens=[record.output_len for record in first.records],
            repeated_first_pass=again.duration / first.duration,
        )

    def first_pass(self) -> FirstPass:
        """Serve all prompts at once under `fcfs`."""
        points: list[tuple[float, int]] = []  # time and tokens so far, of steps with a full batch
        tokens = 0
        with self._sides.alone(dataclasses.replace(self._config, policy="fcfs")) as driver:

            def on_step(changed: list[SteppedRecord]) -> None:
                nonlocal tokens
                tokens += len(changed)
                if changed and driver.engine.load().num_waiting:
                    points.append((changed[0].delta_times[-1] - start, tokens))

            start = driver.now()
            requests = self._all_at_once(self._prompts, start)
            title = self._sides.title("first pass")
            result = driver.run(requests, on_step=on_step, progress=title)
        seconds, tokens = points[-1] if points else (result.duration, tokens)
        mean = float(np.mean([record.output_len for record in result.records]))
        return FirstPass(result.records, tokens / seconds / mean, result.duration)

    def teach(self, predictor: str) -> None:
        """Let a predictor learn from the lessons, and keep what it learned."""
        config = self._with(f"fcfs:{predictor}")
        # Nothing is measured here: more at a time take less time.
        config = dataclasses.replace(config, max_num_seqs=LESSON_SLOTS * config.max_num_seqs)
        with self._sides.alone(config) as driver:
            requests = self._all_at_once(self._lessons, driver.now())
            driver.run(requests, progress=self._sides.title(f"lessons of {predictor}"))

    def run_side(self, side: str, first: FirstPass, rate: float) -> PolicyFigures:
        """Serve the trace on one side and return its figures."""
        with self._sides.alone(self._with(side)) as driver:
            requests = self._trace(driver.now(), side, first, rate)
            result = driver.run(requests, progress=self._sides.title(side))
            load = driver.engine.load()
        complete = {r.request_id: r.token_ids for r in result.records if r.is_complete}
        expected = {r.request_id: r.token_ids for r in first.records}
        pairs = {"first": [expected[key] for key in complete], "here": [*complete.values()]}
        predicts = load.num_predictions > 0
        return PolicyFigures(
            **_figures(result, requests),
            preemptions=load.num_preemptions,
            prediction_mae=load.prediction_mae if predicts else None,
            prediction_kendall_tau=load.prediction_kendall_tau if predicts else None,
            num_answers=len(complete),
            differing_answers=differing_answers(pairs)["here"],
        )

    def _trace(
        self,
        start: float,
        side: str,
        first: FirstPass,
        rate: float,
    ) -> list[TimedRequest]:
        spec = self._spec
        items = [WorkloadItem(None, np.asarray(prompt), 1) for prompt in self._prompts]
        times = arrival_times(items, rate, spec.burstiness, spec.seed)
        interactive = np.random.default_rng(spec.seed).random(len(items)) < 0.5
        oracle = side_options(side)["length_predictor"] == "oracle"
        return [
            _request(
                i,
                prompt,
                start + float(times[i]),
                first.records[i].output_len if oracle else spec.max_output_len,
                ServiceParams(
                    priority=0 if interactive[i] else 1,
                    ttft_target=spec.ttft_target * (1.0 if interactive[i] else RELAXED),
                    tpot_target=spec.tpot_target,
                ),
            )
            for i, prompt in enumerate(self._prompts)
        ]

    def _all_at_once(self, prompts: Sequence[Sequence[int]], start: float) -> list[TimedRequest]:
        most = self._spec.max_output_len
        return [_request(i, prompt, start, most) for i, prompt in enumerate(prompts)]

    def _with(self, side: str) -> EngineConfig:
        options = side_options(side)
        directory = self._directory / options["length_predictor"]
        return dataclasses.replace(self._config, predictor_dir=str(directory), **options)


def _request(
    index: int,
    prompt: Sequence[int],
    arrival: float,
    max_tokens: int,
    service: ServiceParams | None = None,
) -> TimedRequest:
    return TimedRequest(
        request_id=f"r{index}",
        prompt_token_ids=prompt,
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        service=service or ServiceParams(),
        arrival=arrival,
    )


def _figures(result: RunResult, requests: Sequence[TimedRequest]) -> dict[str, Any]:
    done = [record for record in result.records if record.is_complete]
    if not done:
        raise JaxserveError("every request was given up: nothing can be said about latencies")
    latencies = np.array([r.latency for r in done], float)
    ttft = ttfts(done)
    services = {request.request_id: request.service for request in requests}
    met = [_meets(record, services[record.request_id]) for record in result.records]
    tight = [
        ok for record, ok in zip(result.records, met, strict=True)
        if not services[record.request_id].priority
    ]  # fmt: skip
    return {
        "mean_latency": float(latencies.mean()),
        "p99_latency": float(np.percentile(latencies, 99)),
        "mean_ttft": float(ttft.mean()),
        "p99_ttft": float(np.percentile(ttft, 99)),
        "slo_attainment": float(np.mean([all(ok) for ok in met])),
        "ttft_attainment": float(np.mean([ok[0] for ok in met])),
        "tpot_attainment": float(np.mean([ok[1] for ok in met])),
        "interactive_slo_attainment": float(np.mean([all(ok) for ok in tight])) if tight else 1.0,
        "shed": sum(r.finish_reason is FinishReason.SHED for r in result.records),
        "duration": result.duration,
        "output_throughput": sum(r.output_len for r in done) / result.duration,
        "latencies": latencies.tolist(),
        "ttfts": ttft.tolist(),
    }


def _meets(record: SteppedRecord, service: ServiceParams) -> tuple[bool, bool]:
    """Whether a request met its TTFT and its TPOT target."""
    if not record.is_complete:
        return False, False
    assert record.ttft is not None and service.ttft_target and service.tpot_target
    return record.ttft <= service.ttft_target, (record.tpot or 0.0) <= service.tpot_target
