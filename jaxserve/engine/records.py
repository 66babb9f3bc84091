"""What the engine remembers of its last steps and requests, and whom it tells of them.

One record per step and one per request that ended; what is said per token is counted by value
first, since all requests of a step get their tokens at the same moment. So watching costs the
loop a few microseconds per step, however many rows it has.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from jaxserve.core.request import FinishReason, Request
from jaxserve.core.step import StepPlan
from jaxserve.runner.buckets import Buckets, pick

log = logging.getLogger(__name__)

CAPACITY = 512

R = TypeVar("R", "StepRecord", "RequestRecord")


class StepRecord(NamedTuple):
    """One step that ran. Times are seconds on the engine's clock (monotonic).

    Attributes:
        number: counts the steps, from 1.
        launched, collected: when it was sent to the device, and when its tokens were there.
        seconds: how long the device was at it: from when it was launched, or the device was done
            with the step before, to `collected`.
        num_tokens: query tokens of prompts and answers.
        token_bucket: to how many they were padded, over all data shards.
        num_rows: requests that had a part in it.
        num_sampled: rows of them that sampled a token.
        row_bucket: to how many those were padded, over all data shards; 0 if none sampled.
        num_generated: tokens that reached a request (fewer if one ended meanwhile).
        num_running, num_waiting: requests, as the step was collected.
        num_used_pages: KV pages that requests held then.
    """

    number: int
    launched: float
    collected: float
    seconds: float
    num_tokens: int
    token_bucket: int
    num_rows: int
    num_sampled: int
    row_bucket: int
    num_generated: int
    num_running: int
    num_waiting: int
    num_used_pages: int

    @property
    def num_padding_tokens(self) -> int:
        """Tokens that the device computed for nothing."""
        return self.token_bucket - self.num_tokens


class RequestRecord(NamedTuple):
    """One request that ended. Times are seconds on the engine's clock (monotonic).

    Attributes:
        number: counts the ended requests, from 1.
        request_id, tenant: as the request named them.
        traceparent: the caller's W3C trace context; empty for none.
        arrival: when it was asked for.
        started: when it first got to run; None if it never did.
        first_token, last_token: when those came; None without any.
        finished: when it ended.
        num_prompt_tokens, num_output_tokens: tokens, of the answer those that were delivered.
        num_cached_tokens: prompt tokens whose KV was found in a cache.
        num_fetched_tokens: those of them that came from host memory or disk.
        num_preemptions: how often it had to make room for others.
        is_answered: whether an answer was wanted, and not only the prompt, as for an embedding.
        max_tokens: tokens that the answer could have had.
        asked_max_tokens: tokens that the caller allowed; None for as many as there is room for.
        temperature, top_p: how it was sampled.
        finish_reason: why it ended.
    """

    number: int
    request_id: str
    tenant: str
    traceparent: str
    arrival: float
    started: float | None
    first_token: float | None
    last_token: float | None
    finished: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_fetched_tokens: int
    num_preemptions: int
    is_answered: bool
    max_tokens: int
    asked_max_tokens: int | None
    temperature: float
    top_p: float
    finish_reason: FinishReason

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def queue_seconds(self) -> float | None:
        """Seconds from arrival until it first ran."""
        return None if self.started is None else self.started - self.arrival

    @property
    def prefill_seconds(self) -> float | None:
        """Seconds from when it first ran to the first token."""
        if self.started is None or self.first_token is None:
            return None
        return self.first_token - self.started

    @property
    def decode_seconds(self) -> float | None:
        """Seconds from the first token to the last."""
        if self.first_token is None or self.last_token is None:
            return None
        return self.last_token - self.first_token

    @property
    def inference_seconds(self) -> float | None:
        """Seconds from when it first ran to the last token."""
        if self.started is None or self.last_token is None:
            return None
        return self.last_token - self.started

    @property
    def seconds_per_output_token(self) -> float | None:
        """Mean seconds per token after the first; None without a second one."""
        if self.decode_seconds is None or self.num_output_tokens < 2:
            return None
        return self.decode_seconds / (self.num_output_tokens - 1)

    @property
    def e2e_seconds(self) -> float:
        """Seconds from arrival to the end."""
        return self.finished - self.arrival


class TokenTimes(NamedTuple):
    """When the tokens of one step came, seen from their requests.

    Attributes:
        first_tokens: seconds from arrival, for each request that got its first one.
        gaps: seconds since the token before, and how many of the step's tokens had that.
        num_prompt_tokens: tokens of the prompts that the step completed.
        num_cached_tokens: those of them whose KV was found in a cache.
        num_fetched_tokens: those of these that came from host memory or disk.
    """

    first_tokens: list[float]
    gaps: dict[float, int]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_fetched_tokens: int


class EngineObserver(Protocol):
    """Is told what the engine does, on the engine's thread: must be quick.

    One that raises is told nothing any more; the engine goes on.
    """

    def step_done(self, step: StepRecord, times: TokenTimes) -> None:
        """A step was collected."""
        ...

    def prompt_answered(self, n: int, num_tokens: int) -> None:
        """All `n` answers to a prompt have ended by themselves; on any thread.

        Args:
            n: how many there were.
            num_tokens: of the longest of them.
        """
        ...

    def request_done(self, record: RequestRecord, request: Request) -> None:
        """A request ended.

        Args:
            record: what there is to say of it.
            request: itself, for the prompt; it does not change any more, and is only read.
        """
        ...


class EngineRecords:
    """The last steps and requests of an engine, and the observers of both.

    The engine's thread writes, any thread reads.

    Args:
        buckets: what steps are padded to; None for an executor that does not pad.
        ready_buckets: says which of them are there by now; by default all.
        num_shards: data shards of the mesh.
        capacity: how many steps, and how many requests, are remembered.

    Attributes:
        observers: told of every step and request from when they are added; see `observe`.
    """

    def __init__(
        self,
        buckets: Buckets | None = None,
        num_shards: int = 1,
        capacity: int = CAPACITY,
        *,
        ready_buckets: Callable[[], Buckets] | None = None,
    ) -> None:
        self._buckets = buckets
        self._ready_buckets = ready_buckets or (lambda: buckets)
        self._num_shards = num_shards
        self._lock = threading.Lock()
        self._steps: deque[StepRecord] = deque(maxlen=capacity)
        self._requests: deque[RequestRecord] = deque(maxlen=capacity)
        self._num_steps = 0
        self._num_requests = 0
        self._clock_offset = time.monotonic() - time.perf_counter()
        self.observers: tuple[EngineObserver, ...] = ()

    # -- for readers ----------------------------------------------------------------

    @property
    def token_buckets(self) -> tuple[int, ...]:
        """How many tokens a step may be padded to, over all data shards; empty if it is not."""
        sizes = self._buckets.tokens if self._buckets is not None else ()
        return tuple(size * self._num_shards for size in sizes)

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """How many sampled rows a step may be padded to, likewise."""
        sizes = self._buckets.sampled if self._buckets is not None else ()
        return tuple(size * self._num_shards for size in sizes)

    def observe(self, observer: EngineObserver) -> None:
        """Tell an observer of everything from now on."""
        with self._lock:
            self.observers = (*self.observers, observer)

    def prompt_answered(self, n: int, num_tokens: int) -> None:
        """Tell that a prompt's `n` answers, each a request of its own, have ended by themselves.

        Args:
            n: how many there were.
            num_tokens: of the longest of them.
        """
        for observer in self.observers:
            observer.prompt_answered(n, num_tokens)

    def steps(self, after: int = 0) -> list[StepRecord]:
        """The steps still remembered, oldest first, with numbers above `after`."""
        return self._newer(self._steps, after)

    def requests(self, after: int = 0) -> list[RequestRecord]:
        """The ended requests still remembered, oldest first, with numbers above `after`."""
        return self._newer(self._requests, after)

    def _newer(self, ring: "deque[R]", after: int) -> "list[R]":
        with self._lock:
            if not ring or ring[-1].number <= after:
                return []
            return list(ring) if after < ring[0].number else [r for r in ring if r.number > after]

    # -- for the engine -------------------------------------------------------------------

    def set_clock(self, now: float) -> None:
        """Say what time it is on the clock that the engine's caller goes by."""
        self._clock_offset = now - time.perf_counter()

    def now(self) -> float:
        """The time on that clock."""
        return time.perf_counter() + self._clock_offset

    def step_done(
        self,
        plan: StepPlan,
        sizes: tuple[int, int],
        *,
        launched: float,
        collected: float,
        seconds: float,
        answered: Sequence[Request],
        prompted: Sequence[Request],
        load: tuple[int, int, int],
    ) -> None:
        """Note that a step was collected; before `request_done` of those that ended with it.

        Args:
            plan: the step; one without rows is not noted.
            sizes: tokens, and rows that sample, of its fullest data shard.
            launched, collected: when it was, in `time.perf_counter`'s seconds.
            seconds: how long the device was at it.
            answered: those that got a token of it.
            prompted: those of which only the prompt was wanted, which it completed.
            load: running and waiting requests, and used pages.
        """
        if not plan.rows:
            return
        at = collected + self._clock_offset
        times = _token_times(answered, prompted, at)
        token_bucket, row_bucket = self._padded(*sizes)
        num_tokens, num_sampled = sizes  # counted already, unless there are other shards
        if self._num_shards > 1:
            num_tokens = plan.num_tokens
            num_sampled = sum([row.samples for row in plan.rows])
        step = StepRecord(
            number=self._num_steps + 1,
            launched=launched + self._clock_offset,
            collected=at,
            seconds=seconds,
            num_tokens=num_tokens,
            token_bucket=token_bucket,
            num_rows=len(plan.rows),
            num_sampled=num_sampled,
            row_bucket=row_bucket,
            num_generated=len(answered),
            num_running=load[0],
            num_waiting=load[1],
            num_used_pages=load[2],
        )
        with self._lock:
            self._num_steps += 1
            self._steps.append(step)
        for observer in self.observers:
            try:
                observer.step_done(step, times)
            except Exception:
                self._drop(observer)

    def _padded(self, tokens: int, sampled: int) -> tuple[int, int]:
        buckets = self._ready_buckets()
        if buckets is None:
            return tokens * self._num_shards, sampled * self._num_shards
        token_bucket = pick(buckets.tokens, tokens)
        row_bucket = pick(buckets.sampled, sampled) if sampled else 0
        return token_bucket * self._num_shards, row_bucket * self._num_shards

    def request_done(self, request: Request, reason: FinishReason, num_output_tokens: int) -> None:
        """Note that a request ended, now.

        Args:
            request: the request.
            reason: why.
            num_output_tokens: tokens that its caller got.
        """
        params, service = request.params, request.service
        finished = self.now() if request.last_token_time is None else request.last_token_time
        if not reason.is_natural:
            finished = self.now()
        record = RequestRecord(
            number=self._num_requests + 1,
            request_id=request.request_id,
            tenant=service.tenant,
            traceparent=service.traceparent,
            arrival=request.arrival_time,
            started=request.started_time,
            first_token=request.first_token_time,
            last_token=request.last_token_time,
            finished=finished,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_output_tokens=num_output_tokens,
            num_cached_tokens=request.num_reused_tokens or 0,
            num_fetched_tokens=request.num_fetched_tokens,
            num_preemptions=request.num_preemptions,
            is_answered=request.is_answered,
            max_tokens=request.max_tokens,
            asked_max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            finish_reason=reason,
        )
        with self._lock:
            self._num_requests += 1
            self._requests.append(record)
        for observer in self.observers:
            try:
                observer.request_done(record, request)
            except Exception:
                self._drop(observer)

    def _drop(self, observer: EngineObserver) -> None:
        """Go on without an observer that raised: observers may not stop the engine."""
        log.exception("%r failed and is told nothing any more", observer)
        with self._lock:
            self.observers = tuple(o for o in self.observers if o is not observer)


def _token_times(answered: Sequence[Request], prompted: Sequence[Request], at: float) -> TokenTimes:
    """Take the time of one more token of each answered request."""
    firsts: list[Request] = []
    befores: dict[float, int] = {}
    for request in answered:
        before = request.last_token_time
        request.last_token_time = at
        if before is None:
            request.first_token_time = at
            firsts.append(request)
        else:
            befores[before] = befores.get(before, 0) + 1
    complete = (*firsts, *prompted)
    return TokenTimes(
        [at - request.arrival_time for request in firsts],
        {at - before: count for before, count in befores.items()},
        sum(len(request.prompt_token_ids) for request in complete),
        sum(request.num_reused_tokens or 0 for request in complete),
        sum(request.num_fetched_tokens for request in complete),
    )
