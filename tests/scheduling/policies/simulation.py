"""A dumb scheduler that serves one step at a time, to show what a policy makes of a workload.

It sorts everything anew at every step, has no pages, and checks what policies promise: that
ranks stand still unless the policy says otherwise, and that groups never move up while they wait.
"""

import itertools
import math
import random
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from jaxserve.core.request import FinishReason, Request, RequestState
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.scheduling.policies import Policy

SIGMA = 1.3  # of the logarithm of answer lengths

_numbers = itertools.count()


def make_request(
    prompt_len: int = 8,
    answer_len: int = 4,
    *,
    arrival: float = 0.0,
    predicted: float | None = None,
    **service: Any,
) -> Request:
    """A request whose answer has `max_tokens` tokens; `service` are fields of ServiceParams."""
    return Request(
        request_id=str(next(_numbers)),
        prompt_token_ids=[1] * prompt_len,
        params=SamplingParams(),
        service=ServiceParams(**service),
        max_tokens=answer_len,
        arrival_time=arrival,
        last_progress=arrival,
        predicted_len=predicted,
    )


def serve(policy: Policy, request: Request, num_tokens: int, now: float = 0.0) -> None:
    """Compute so many of a request's tokens, the last of which samples if none is left."""
    compute(request, num_tokens, lambda served: policy.served(served, now))


def compute(
    request: Request, num_tokens: int, tell: Callable[[list[tuple[Request, int]]], None]
) -> None:
    """Compute so many of a request's tokens, and tell of it when a scheduler would."""
    request.num_computed_tokens += num_tokens
    assert request.num_computed_tokens <= request.num_tokens
    if request.num_computed_tokens == request.num_tokens:
        request.num_pending_tokens = 1
        request.num_tokens += 1
    tell([(request, num_tokens)])
    if request.num_pending_tokens:
        request.num_pending_tokens = 0
        request.output_token_ids.append(1)


def goes_first(policy: Policy, one: Request, other: Request, now: float = 0.0) -> bool:
    """Whether `one` ranks before `other`, ties apart."""
    first, second = [(policy.priority(request, now), 0) for request in (one, other)]
    return first < second


class Simulation:
    """One engine with a fixed number of slots and a token budget per step.

    Args:
        policy: who goes first.
        slots: requests that run at once.
        budget: tokens of a step; decodes take theirs first.
        kv_tokens: what the running requests may hold together; the last in order is preempted.
        starvation_timeout: seconds without progress until a request goes first, to its end.
        step_seconds: how long a step of so many tokens takes.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        slots: int,
        budget: int,
        kv_tokens: int | None = None,
        starvation_timeout: float = 60.0,
        step_seconds: Callable[[int], float] = lambda tokens: 1.0,
    ) -> None:
        self.policy = policy
        self.slots = slots
        self.budget = budget
        self.kv_tokens = kv_tokens
        self.starvation_timeout = starvation_timeout
        self.step_seconds = step_seconds
        self.now = 0.0
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.first_token: dict[int, float] = {}  # by key
        self.done: dict[int, float] = {}  # by key
        self.shed: list[Request] = []
        self.num_displaced = 0
        self.longest_pause = 0.0
        self._overdue: set[int] = set()  # by key; until they are finished
        self._ranks: dict[int, Any] = {}
        self._groups: dict[Hashable, float] = {}

    def run(self, requests: Iterable[Request]) -> None:
        """Serve all requests, each from its arrival on, to their ends."""
        arrivals = sorted(requests, key=lambda r: (r.arrival_time, r.key))
        while arrivals or self.waiting or self.running:
            if arrivals and not self.waiting and not self.running:
                self.now = max(self.now, arrivals[0].arrival_time)
            while arrivals and arrivals[0].arrival_time <= self.now:
                self.add(arrivals.pop(0))
            self.step()

    def add(self, request: Request) -> None:
        self.policy.arrived(request, self.now)
        self._enqueue(request)

    def abort(self, request: Request) -> None:
        self._end(request, FinishReason.ABORT)

    def reprioritize(self, request: Request) -> None:
        """A predictor has changed its mind about the request."""
        self._ranks[request.key] = self.policy.priority(request, self.now)

    def step(self) -> None:
        """Displace, admit, compute, and let the time of the step pass."""
        self._check_promises()
        barred = {request.key for request in self._make_room()}
        self.running.sort(key=self._order)
        rows = self._running_rows(barred)
        budget = self.budget - sum(rows.values())
        for request in sorted(self.waiting, key=self._order):
            if self.policy.traits.sheds and self.policy.sheds(request, self.now):
                self.shed.append(request)
                self._end(request, FinishReason.SHED)
                continue
            fits = len(self.running) < self.slots and self._fits(request)
            if request.key in barred or not budget or not fits:
                break
            self.waiting.remove(request)
            request.state = RequestState.RUNNING
            self.running.append(request)
            granted = min(budget, request.num_tokens)
            self._serve(request, granted)
            rows[request.key] = granted
            budget -= granted
        self._ranks |= {request.key: self._rank(request) for request in self.running}
        self.now += self.step_seconds(sum(rows.values()))
        for request in [r for r in self.running if r.num_pending_tokens]:
            request.num_pending_tokens = 0
            request.output_token_ids.append(1)
            self.first_token.setdefault(request.key, self.now)
            if request.num_output_tokens == request.max_tokens:
                self.done[request.key] = self.now
                self._end(request, FinishReason.LENGTH)

    def _make_room(self) -> list[Request]:
        displaced: list[Request] = []
        if len(self.running) < self.slots:
            return displaced
        budget = self.budget - sum(r.num_tokens - r.num_computed_tokens for r in self.running)
        for newcomer in sorted(self.waiting, key=self._order):
            if not self.running or budget <= 0:  # it could not start at once
                break
            budget -= newcomer.num_tokens
            last = max(self.running, key=self._order)
            if self._order(newcomer) > self._order(last):
                break
            if not self.policy.displaces(newcomer, last, self.now) or self._is_overdue(last):
                break
            self._preempt(last)
            displaced.append(last)
        self.num_displaced += len(displaced)
        return displaced

    def _running_rows(self, barred: set[int]) -> dict[int, int]:
        rows: dict[int, int] = {}
        budget = self.budget
        by_need = sorted(self.running, key=lambda r: r.num_tokens - r.num_computed_tokens > 1)
        for request in by_need:
            granted = min(budget, request.num_tokens - request.num_computed_tokens)
            if not granted or request.key in barred:
                continue
            while not self._fits(None) and request in self.running and len(self.running) > 1:
                victim = next(r for r in reversed(self.running) if r.key not in rows)
                self._preempt(victim)
                barred.add(victim.key)
            if request in self.running:
                self._serve(request, granted)
                rows[request.key] = granted
                budget -= granted
        return rows

    def _fits(self, newcomer: Request | None) -> bool:
        held = sum(r.num_tokens for r in self.running) + (newcomer.num_tokens if newcomer else 0)
        return self.kv_tokens is None or not self.running or held <= self.kv_tokens

    def _serve(self, request: Request, num_tokens: int) -> None:
        request.num_computed_tokens += num_tokens
        if request.num_computed_tokens == request.num_tokens:
            request.num_pending_tokens = 1
            request.num_tokens += 1
        self.longest_pause = max(self.longest_pause, self.now - request.last_progress)
        request.last_progress = self.now
        self.policy.served([(request, num_tokens)], self.now)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.policy.preempted(request, self.now)
        self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        request.state = RequestState.WAITING
        self.waiting.append(request)
        self._ranks[request.key] = self.policy.priority(request, self.now)

    def _end(self, request: Request, reason: FinishReason) -> None:
        (self.waiting if request in self.waiting else self.running).remove(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        self.policy.finished(request)

    def _is_overdue(self, request: Request) -> bool:
        if self.policy.traits.ages and self.now - request.last_progress > self.starvation_timeout:
            self._overdue.add(request.key)
        return request.key in self._overdue

    def _rank(self, request: Request) -> Any:
        traits = self.policy.traits
        moves = traits.refreshes if request in self.waiting else traits.reranks
        rank = self.policy.priority(request, self.now)
        assert moves or rank == self._ranks.get(request.key, rank), "a rank moved unannounced"
        return rank

    def _order(self, request: Request) -> tuple[Any, ...]:
        if self._is_overdue(request):
            return (0.0, request.arrival_time, request.key)
        group = self.policy.group_priority(self.policy.group(request), self.now)
        return (1.0, group, self._rank(request), request.key)

    def _check_promises(self) -> None:
        groups = {self.policy.group(request) for request in self.waiting}
        ranks = {group: self.policy.group_priority(group, self.now) for group in groups}
        for group, rank in ranks.items():
            assert rank >= self._groups.get(group, rank), "a group moved up while it waited"
        self._groups = ranks


def bursty(
    count: int, *, seed: int, slots: int, load: float, mean_answer: float = 24.0
) -> list[Request]:
    """Requests in bursts, at `load` of what so many slots can do at a token per second each.

    Lengths of answers are lognormal, as real ones are: many short ones, few very long ones, and
    without such a tail nothing is gained by favouring who had little service. Prompts have 4 to
    64 tokens. Predictions are right.
    """
    rng = random.Random(seed)
    requests, now = [], 0.0
    while len(requests) < count:
        burst = min(rng.randint(1, 12), count - len(requests))
        for _ in range(burst):
            answer = 1 + int(rng.lognormvariate(math.log(mean_answer) - SIGMA**2 / 2, SIGMA))
            request = make_request(rng.randint(4, 64), answer, arrival=now, predicted=answer)
            requests.append(request)
        now += rng.expovariate(1.0) * burst * (mean_answer + 2) / slots / load
    return requests
