"""Drives an `Engine` on the caller's thread: requests come in at their times, tokens are timed.

One thread does everything, which is the simplest load generator and the least noisy one: between
two steps it adds whatever is due. So a request that falls due during a step is added when the
step is over, as in a server; its latencies count from when it was due.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from jaxserve.bench.load import LoadResult, RequestRecord
from jaxserve.core.errors import JaxserveError
from jaxserve.core.request import FinishReason
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine


def greedy(num_tokens: int) -> SamplingParams:
    """Exactly so many tokens, each the most likely one, on past the end of the text."""
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TimedRequest:
    """A request and when it is due, in seconds from the driver's start."""

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    service: ServiceParams = dataclasses.field(default_factory=ServiceParams)
    arrival: float = 0.0


@dataclasses.dataclass(kw_only=True)
class SteppedRecord(RequestRecord):
    """What happened to one request; `start` is when it was due.

    Latencies are None until there are tokens enough to tell.

    Attributes:
        request_id: whose.
        token_ids: its answer.
        num_cached_tokens: prompt tokens that were not computed since their KV was in a cache.
        finish_reason: why it ended; None while it has not.
    """

    request_id: str
    token_ids: list[int] = dataclasses.field(default_factory=list)
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None

    @property
    def is_complete(self) -> bool:
        """Whether it was answered, neither aborted nor given up."""
        return self.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token."""
        return self.delta_times[0] - self.start if self.delta_times else None

    @property
    def latency(self) -> float | None:
        """Seconds to the last token of an answer that is complete."""
        return self.delta_times[-1] - self.start if self.is_complete else None

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first, of a complete answer of two or more."""
        if not self.is_complete or self.output_len < 2:
            return None
        return (self.delta_times[-1] - self.delta_times[0]) / (self.output_len - 1)


@dataclasses.dataclass(frozen=True)
class RunResult(LoadResult):
    """A `LoadResult` whose records have the answers, too."""

    records: tuple[SteppedRecord, ...]


class Driver:
    """Adds requests to an engine, steps it, and notes when every token came.

    Args:
        engine: nobody else steps it meanwhile.
        clock, sleep: the time and how to wait; tests bring their own.

    Attributes:
        engine: the engine.
        records: of all requests so far, by id, in the order they were added.
    """

    def __init__(
        self,
        engine: "Engine",
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.engine = engine
        self.records: dict[str, SteppedRecord] = {}
        self._clock, self._sleep = clock, sleep
        self._start = clock()

    def now(self) -> float:
        """Seconds since the driver's start."""
        return self._clock() - self._start

    def add(self, request: TimedRequest) -> SteppedRecord:
        """Queue a request that is due.

        Raises:
            JaxserveError: the engine refused it, or the id was used before.
        """
        if request.request_id in self.records:
            raise JaxserveError(f"request id {request.request_id!r} was used before")
        # The engine, too, counts from when it was due: targets are kept or missed by that.
        self.engine.add(
            request.request_id, request.prompt_token_ids, request.params, request.service,
            now=self._start + request.arrival,
        )  # fmt: skip
        record = SteppedRecord(
            request_id=request.request_id,
            prompt_len=len(request.prompt_token_ids),
            start=request.arrival,
        )
        self.records[request.request_id] = record
        return record

    def step(self) -> list[SteppedRecord]:
        """One step of the engine; the records that it added tokens to, or ended."""
        deltas = self.engine.step(self._clock())
        now = self.now()
        changed = []
        for delta in deltas:
            record = self.records[delta.request_id]
            if delta.token_ids:
                if not record.delta_times:
                    record.num_cached_tokens = delta.num_cached_tokens
                record.delta_times.append(now)
                record.delta_tokens.append(len(delta.token_ids))
                record.token_ids.extend(delta.token_ids)
            record.text += delta.text
            record.finish_reason = delta.finish_reason
            changed.append(record)
        return changed

    def run(
        self,
        requests: Iterable[TimedRequest],
        *,
        on_step: Callable[[list[SteppedRecord]], None] = lambda changed: None,
        progress: str | None = None,
    ) -> RunResult:
        """Serve requests, each from its time on, until all are answered.

        Args:
            requests: in any order.
            on_step: told after every step which records changed.
            progress: show a bar with this title on stderr.

        Returns:
            Their records in order of arrival, and the seconds from the first arrival to the
            last token.
        """
        due = sorted(requests, key=lambda request: request.arrival)
        mine: list[SteppedRecord] = []
        with tqdm(total=len(due), desc=progress, unit="req", disable=progress is None) as bar:
            while len(mine) < len(due) or self.engine.has_work:
                while len(mine) < len(due) and due[len(mine)].arrival <= self.now():
                    mine.append(self.add(due[len(mine)]))
                if not self.engine.has_work:
                    self._sleep(max(0.0, due[len(mine)].arrival - self.now()))
                    continue
                changed = self.step()
                on_step(changed)
                if ended := sum(record.finish_reason is not None for record in changed):
                    bar.update(ended)
        first = due[0].arrival if due else 0.0
        last = max((r.delta_times[-1] for r in mine if r.delta_times), default=first)
        return RunResult(tuple(mine), last - first)

    def serve(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> SteppedRecord:
        """Serve one request, due now, to its end."""
        request = TimedRequest(
            request_id=request_id, prompt_token_ids=prompt_token_ids, params=params,
            arrival=self.now(),
        )  # fmt: skip
        self.run([request])
        return self.records[request_id]

    def stop(self) -> None:
        """Abort what is unfinished and empty the engine."""
        for record in self.records.values():
            if record.finish_reason is None and self.engine.abort(record.request_id) is not None:
                record.finish_reason = FinishReason.ABORT
        while self.engine.has_work:
            self.engine.step(self._clock())
