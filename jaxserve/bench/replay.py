"""A trace scaled to a machine, and replayed through the real scheduler under a simulated clock.

The scheduler takes the time as an argument and holds no device, so steps can be planned as the
engine would plan them, thousands a second, with a cost model in the device's place.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxserve.bench.workloads import WorkloadItem
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.request import FinishReason, Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.step import StepPlan, StepResult
from jaxserve.core.step_histogram import StepHistogram
from jaxserve.runner.buckets import doubling_buckets
from jaxserve.scheduling.build import build_scheduler


class StepRecorder:
    """Notes of every step how large it is and how full its pages are.

    Attributes:
        histogram: the steps' sizes.
        kv_tokens: tokens that lie in pages of a step's rows, over all steps.
        kv_slots: tokens that these pages have room for, over all steps.
    """

    def __init__(self, page_size: int) -> None:
        self.histogram = StepHistogram()
        self.kv_tokens = 0
        self.kv_slots = 0
        self._page_size = page_size

    def add(self, plan: StepPlan) -> None:
        """Note a step."""
        self.histogram.add(plan)
        self.kv_tokens += sum([row.end for row in plan.rows])
        self.kv_slots += sum([len(row.page_ids) for row in plan.rows]) * self._page_size

    @property
    def unused_kv_fraction(self) -> float:
        """The part of all reserved slots that hold no token: PagedAttention's fragmentation."""
        return 1 - self.kv_tokens / self.kv_slots if self.kv_slots else 0.0


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a replay came to.

    Attributes:
        steps: their sizes.
        seconds: from the first arrival to the last token, simulated.
        busy_seconds: those in which the device worked.
        latencies: seconds from arrival to last token, float64 [requests], in order of arrival.
        ttfts: seconds from arrival to first token, likewise.
    """

    steps: StepRecorder
    seconds: float
    busy_seconds: float
    latencies: np.ndarray
    ttfts: np.ndarray


def replay(
    items: Sequence[WorkloadItem], config: EngineConfig, cost: Callable[[int], float]
) -> Replay:
    """Serve requests in simulated time; answers have the length the trace says.

    Policies that go by predicted lengths are told the true ones.

    Args:
        items: in order of arrival; those without one arrive at 0.
        config: the engine's options, with `num_pages` and `max_model_len`; one data shard.
        cost: seconds of a step of so many tokens.

    Raises:
        InvalidRequest: a request is too long for the limits.
    """
    return _Simulation(items, config, cost).run(config.overlap)


class _Simulation:
    """The engine's loop with a number for a clock."""

    def __init__(
        self, items: Sequence[WorkloadItem], config: EngineConfig, cost: Callable[[int], float]
    ) -> None:
        self._requests = [_request(index, item) for index, item in enumerate(items)]
        config = dataclasses.replace(
            config, max_waiting=max(1, len(items)), length_predictor="oracle"
        )
        sizes = doubling_buckets(config.max_num_batched_tokens)
        self._scheduler = build_scheduler(config, step_sizes=sizes)
        self._cost = cost
        self._steps = StepRecorder(config.page_size)
        self._now = self._device_free = self._busy = 0.0
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}

    def run(self, overlap: bool) -> Replay:
        arrivals = iter(self._requests)
        coming = next(arrivals, None)
        in_flight: tuple[StepPlan, float] | None = None
        while coming is not None or in_flight is not None or self._scheduler.has_work:
            while coming is not None and coming.arrival_time <= self._now:
                self._scheduler.add(coming)
                coming = next(arrivals, None)
            launched = self._launch()
            if overlap:
                launched, in_flight = in_flight, launched
            if launched is not None:
                self._collect(*launched)
            elif in_flight is None:
                if coming is None:
                    raise ConfigError("the scheduler has work and plans none of it")
                self._now = coming.arrival_time
        start = self._requests[0].arrival_time if self._requests else 0.0
        return Replay(
            self._steps, self._now - start, self._busy, self._since_arrival(self._last),
            self._since_arrival(self._first),
        )  # fmt: skip

    def _since_arrival(self, times: dict[int, float]) -> np.ndarray:
        return np.array([times[r.key] - r.arrival_time for r in self._requests])

    def _launch(self) -> tuple[StepPlan, float] | None:
        plan = self._scheduler.plan(self._now)
        if plan is None:
            return None
        self._steps.add(plan)
        seconds = self._cost(plan.num_tokens)
        self._busy += seconds
        self._device_free = max(self._now, self._device_free) + seconds
        return plan, self._device_free

    def _collect(self, plan: StepPlan, done: float) -> None:
        self._now = max(self._now, done)
        finished: dict[int, FinishReason] = {}
        for row in plan.rows:
            request = self._scheduler.get_by_key(row.key) if row.samples else None
            if request is None:
                continue
            self._first.setdefault(row.key, self._now)
            if len(request.output_token_ids) + 1 >= request.max_tokens:
                finished[row.key] = FinishReason.LENGTH
                self._last[row.key] = self._now
        self._scheduler.commit(plan, StepResult(np.zeros(len(plan.rows), np.int32)), finished)


def _request(index: int, item: WorkloadItem) -> Request:
    return Request(
        request_id=str(index),
        prompt_token_ids=item.prompt_token_ids.tolist(),
        params=SamplingParams(max_tokens=item.output_len),
        max_tokens=item.output_len,
        arrival_time=item.arrival or 0.0,
        predicted_len=float(item.output_len),
    )


# ---------------------------------------------------------------------------- scaling


def scale_lengths(items: Sequence[WorkloadItem], factor: float) -> list[WorkloadItem]:
    """Prompts and answers shortened alike, to one token at least; the arrivals stay.

    Raises:
        ConfigError: the factor is not in (0, 1].
    """
    if not 0 < factor <= 1:
        raise ConfigError(f"lengths can be scaled by a factor in (0, 1], got {factor}")
    return [
        dataclasses.replace(
            item,
            prompt_token_ids=item.prompt_token_ids[: _scaled(len(item.prompt_token_ids), factor)],
            output_len=_scaled(item.output_len, factor),
        )
        for item in items
    ]


def _scaled(length: int, factor: float) -> int:
    return max(1, round(length * factor))


def fit_lengths(items: Sequence[WorkloadItem], max_model_len: int) -> list[WorkloadItem]:
    """Answers, then prompts, cut so that every request fits the context.

    Raises:
        ConfigError: nothing fits into a context of one token.
    """
    if max_model_len < 2:
        raise ConfigError(f"max_model_len {max_model_len} holds no prompt and answer")
    fitted = []
    for item in items:
        output_len = min(item.output_len, max_model_len - 1)
        prompt = item.prompt_token_ids[: max_model_len - output_len]
        fitted.append(dataclasses.replace(item, prompt_token_ids=prompt, output_len=output_len))
    return fitted


def scale_arrivals(items: Sequence[WorkloadItem], factor: float) -> list[WorkloadItem]:
    """Arrivals multiplied by a factor, the first one at 0."""
    first = items[0].arrival or 0.0 if items else 0.0
    return [
        dataclasses.replace(item, arrival=((item.arrival or 0.0) - first) * factor)
        for item in items
    ]


def at_utilisation(
    items: Sequence[WorkloadItem],
    utilisation: float,
    config: EngineConfig,
    cost: Callable[[int], float],
) -> list[WorkloadItem]:
    """Arrivals stretched so that they bring the device a given part of what it can do.

    What it can do is how fast it serves all of them given at once: 1 is the load at which the
    queue starts to grow without end.

    Raises:
        ConfigError: the utilisation is not positive, or the arrivals span no time.
    """
    if not utilisation > 0:
        raise ConfigError(f"utilisation must be positive, got {utilisation}")
    span = (items[-1].arrival or 0.0) - (items[0].arrival or 0.0)
    if span <= 0:
        raise ConfigError("the requests all arrive at once: there is nothing to stretch")
    together = [dataclasses.replace(item, arrival=0.0) for item in items]
    capacity_seconds = replay(together, config, cost).seconds
    return scale_arrivals(items, capacity_seconds / utilisation / span)
