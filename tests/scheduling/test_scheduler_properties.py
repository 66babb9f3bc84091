"""Random schedules against an oracle that serves every request alone, without pages or batches."""

import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxserve.cache import PagePool
from jaxserve.core.errors import InvalidRequest, QueueFull
from jaxserve.core.request import FinishReason, Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.step import StepPlan, StepResult
from jaxserve.scheduling import Scheduler
from jaxserve.scheduling.policies import Policy, make_policy
from jaxserve.testing.fake_executor import FakeExecutor, FakeModel

EOS = 7
MODEL = FakeModel(vocab_size=50, eos_token_id=EOS, eos_probability=0.03)


class Bench:
    """A scheduler and a fake device, driven one call at a time, every call checked.

    Args:
        policy: the order of service, FCFS by default.
        depth: steps that may be in flight: 1 is no overlap, 2 is the engine's overlap.
    """

    def __init__(
        self,
        *,
        shards: int,
        num_pages: int,
        depth: int,
        policy: Policy | None = None,
        **limits: int,
    ) -> None:
        self.policy = policy or make_policy("fcfs")
        self.pools = [PagePool(num_pages) for _ in range(shards)]
        self.limits = limits
        self.depth = depth
        self.scheduler = Scheduler(
            page_pools=self.pools, policy=self.policy, max_waiting=50, **limits
        )
        self.executor = FakeExecutor(page_size=limits["page_size"], model=MODEL)
        self.requests: list[Request] = []
        self.in_flight: deque[tuple[StepPlan, Any]] = deque()
        self.log: list[tuple[str, Any]] = []  # everything the scheduler was told
        self.clock = 0.0

    def add(self, prompt_len: int, max_tokens: int, seed: int = 0) -> Request | None:
        number = len(self.requests)
        request = make_request(number, prompt_len, max_tokens, seed, arrival_time=self.clock)
        try:
            self.scheduler.add(request)
        except (InvalidRequest, QueueFull):
            return None
        finally:
            self.check()
        self.requests.append(request)
        self.log.append(("add", (number, prompt_len, max_tokens, seed, self.clock)))
        return request

    def abort(self, request: Request) -> None:
        was_finished = request.is_finished
        self.log.append(("abort", request.request_id))
        assert self.scheduler.abort(request.request_id) is not was_finished
        self.check()

    def launch(self) -> bool:
        self.clock += 1.0
        self.log.append(("plan", self.clock))
        plan = self.scheduler.plan(self.clock)
        self.check()
        if plan is None:
            return False
        self.check_limits(plan)
        self.in_flight.append((plan, self.executor.launch(plan)))
        return True

    def collect(self) -> None:
        plan, handle = self.in_flight.popleft()
        result = self.executor.collect(handle)
        finished = self.verdicts(plan, result)
        self.log.append(("commit", (len(self.in_flight), result, finished)))
        self.scheduler.commit(plan, result, finished)
        self.check()

    def drain(self, max_steps: int = 2000) -> None:
        """The engine's loop: keep `depth` steps in flight until all requests are finished."""
        for _ in range(max_steps):
            launched = self.launch()
            if not launched:
                assert self.in_flight or not self.scheduler.has_work, "stuck"
            if self.in_flight and (not launched or len(self.in_flight) == self.depth):
                self.collect()
            if not self.in_flight and not self.scheduler.has_work:
                return
        raise AssertionError("requests make no progress")

    def verdicts(self, plan: StepPlan, result: StepResult) -> Mapping[int, FinishReason]:
        finished = {}
        for row, token in zip(plan.rows, result.token_ids, strict=True):
            request = self.scheduler.get_by_key(row.key)
            if request is None or not row.samples:
                continue
            num_output = len(request.output_token_ids) + 1
            if token == EOS:
                finished[row.key] = FinishReason.STOP
            elif num_output == self.answer_len(request):
                finished[row.key] = FinishReason.LENGTH
        return finished

    def answer_len(self, request: Request) -> int:
        room = self.limits["max_model_len"] - len(request.prompt_token_ids)
        return min(request.max_tokens, room)

    def check(self) -> None:
        self.scheduler.check()
        for request in self.requests:
            if request.is_finished:
                assert request.slot is None and not request.page_ids
        running = [r for r in self.requests if r.slot is not None]
        assert sum(pool.num_used for pool in self.pools) == sum(len(r.page_ids) for r in running)
        assert self.scheduler.num_running == len(running) <= self.limits["max_num_seqs"]

    def check_limits(self, plan: StepPlan) -> None:
        shards = len(self.pools)
        slots_per_shard = self.limits["max_num_seqs"] // shards
        for shard in range(shards):
            rows = [row for row in plan.rows if row.shard == shard]
            tokens = sum(row.num_tokens for row in rows)
            assert tokens <= self.limits["max_num_batched_tokens"] // shards
            assert all(row.slot // slots_per_shard == shard for row in rows)
            pages = [page for row in rows for page in row.page_ids]
            assert len(set(pages)) == len(pages)
            assert set(pages) <= set(range(self.pools[shard].num_total))

    def check_results(self) -> None:
        """All requests ended, with the oracle's tokens; nothing is held."""
        for request in self.requests:
            assert request.is_finished
            oracle = MODEL.generate(request, {EOS})[: self.answer_len(request)]
            if request.finish_reason is FinishReason.ABORT:
                oracle = oracle[: len(request.output_token_ids)]
            else:
                stopped = oracle[-1] == EOS
                expected = FinishReason.STOP if stopped else FinishReason.LENGTH
                assert request.finish_reason is expected
            assert request.output_token_ids == oracle
        assert all(pool.num_free == pool.num_total for pool in self.pools)
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        assert not self.scheduler.has_work

    def check_replay(self) -> None:
        """The same calls on a fresh scheduler give the same plans."""
        pools = [PagePool(pool.num_total) for pool in self.pools]
        scheduler = Scheduler(page_pools=pools, policy=self.policy, max_waiting=50, **self.limits)
        plans: list[StepPlan] = []
        committed = 0
        for what, argument in self.log:
            if what == "add":
                scheduler.add(make_request(*argument))
            elif what == "abort":
                scheduler.abort(argument)
            elif what == "plan":
                plan = scheduler.plan(argument)
                if plan is not None:
                    plans.append(plan)
            else:
                _, result, finished = argument
                scheduler.commit(plans[committed], result, finished)
                committed += 1
        assert plans == self.executor.plans


def make_request(
    number: int, prompt_len: int, max_tokens: int, seed: int, arrival_time: float
) -> Request:
    return Request(
        request_id=f"r{number}",
        prompt_token_ids=random.Random(number).choices(range(50), k=prompt_len),
        params=SamplingParams(),
        max_tokens=max_tokens,
        seed=seed,
        arrival_time=arrival_time,
        key=number,
    )


class ShortestFirst(Policy):
    """Lets late arrivals pass, so that a decode may rank after a prompt still in progress."""

    def priority(self, request: Request, now: float) -> float:
        return len(request.prompt_token_ids)


class SchedulerMachine(RuleBasedStateMachine):
    """Any interleaving of arrivals, aborts, launches and collects."""

    @initialize(
        shards=st.integers(1, 2),
        depth=st.integers(1, 3),
        policy=st.sampled_from([make_policy("fcfs"), ShortestFirst()]),
        num_pages=st.integers(3, 14),
        page_size=st.sampled_from([1, 2, 4]),
        seqs_per_shard=st.integers(1, 4),
        tokens_per_shard=st.integers(1, 12),
    )
    def start(
        self,
        shards: int,
        depth: int,
        policy: Policy,
        num_pages: int,
        page_size: int,
        seqs_per_shard: int,
        tokens_per_shard: int,
    ) -> None:
        self.bench = Bench(
            shards=shards,
            num_pages=num_pages,
            depth=depth,
            policy=policy,
            page_size=page_size,
            max_num_seqs=shards * seqs_per_shard,
            max_num_batched_tokens=shards * tokens_per_shard + (shards - 1),
            max_model_len=24,
        )

    @rule(prompt_len=st.integers(0, 25), max_tokens=st.integers(1, 12), seed=st.integers(0, 3))
    def add(self, prompt_len: int, max_tokens: int, seed: int) -> None:
        self.bench.add(prompt_len, max_tokens, seed)

    @rule(choice=st.integers(0, 1000))
    def abort(self, choice: int) -> None:
        if self.bench.requests:
            self.bench.abort(self.bench.requests[choice % len(self.bench.requests)])

    @precondition(lambda self: len(self.bench.in_flight) < self.bench.depth)
    @rule()
    def launch(self) -> None:
        launched = self.bench.launch()
        assert launched or self.bench.in_flight or not self.bench.scheduler.has_work, "stuck"

    @precondition(lambda self: self.bench.in_flight)
    @rule()
    def collect(self) -> None:
        self.bench.collect()

    @invariant()
    def requests_are_counted(self) -> None:
        scheduler = self.bench.scheduler
        unfinished = sum(not r.is_finished for r in self.bench.requests)
        assert scheduler.num_waiting + scheduler.num_running == unfinished

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.bench.drain()
            self.bench.check_results()
            self.bench.check_replay()


SchedulerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None
)
TestSchedulerMachine = SchedulerMachine.TestCase


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_batched_tokens", [8, 64])
@pytest.mark.parametrize("policy", [make_policy("fcfs"), ShortestFirst()])
def test_busy_server_under_memory_pressure(
    shards: int, depth: int, num_batched_tokens: int, policy: Policy
) -> None:
    rng = random.Random(100 * shards + 10 * depth + num_batched_tokens)
    bench = Bench(
        shards=shards,
        num_pages=20,
        depth=depth,
        policy=policy,
        page_size=4,
        max_num_seqs=8 * shards,
        max_num_batched_tokens=num_batched_tokens * shards,
        max_model_len=64,
    )
    for _ in range(300):
        if rng.random() < 0.3:
            bench.add(rng.randint(1, 30), rng.randint(1, 40), seed=rng.randrange(2**32))
        if rng.random() < 0.03 and bench.requests:
            bench.abort(rng.choice(bench.requests))
        launched = bench.launch()
        if bench.in_flight and (not launched or len(bench.in_flight) == depth):
            bench.collect()
    bench.drain()
    bench.check_results()
    bench.check_replay()
    assert len(bench.requests) > 30
    assert bench.scheduler.num_preemptions > 0, "the pool was meant to be too small"


def test_oracle_does_not_depend_on_the_schedule() -> None:
    """The same requests under very different limits, so no limit can leak into the tokens."""
    outputs = []
    for num_pages, budget, seqs, depth in [(200, 200, 8, 1), (12, 5, 8, 2), (12, 3, 1, 2)]:
        bench = Bench(
            shards=1,
            num_pages=num_pages,
            depth=depth,
            page_size=4,
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            max_model_len=48,
        )
        requests = [bench.add(3 + 5 * i, 20 - i, seed=i) for i in range(6)]
        bench.drain()
        outputs.append([r.output_token_ids for r in requests if r is not None])
        assert len(outputs[-1]) == 6
    assert outputs[0] == outputs[1] == outputs[2]
