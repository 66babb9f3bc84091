"""Random schedules against an oracle that serves every request alone, without pages or batches."""

import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxserve.cache import PagePool
from jaxserve.cache.page_store import PageStore
from jaxserve.core.errors import InvalidRequest, QueueFull
from jaxserve.core.request import FinishReason, Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.core.step import StepPlan, StepResult
from jaxserve.scheduling import Scheduler
from jaxserve.scheduling.policies import POLICIES, Policy, make_policy
from jaxserve.scheduling.settings import SchedulerSettings
from jaxserve.scheduling.shard import Shard
from jaxserve.testing.fake_executor import FakeExecutor, FakeModel

EOS = 7
MODEL = FakeModel(vocab_size=50, eos_token_id=EOS, eos_probability=0.03)


class Bench:
    """A scheduler and a fake device, driven one call at a time, every call checked.

    Args:
        policy: the order of service, FCFS by default.
        depth: steps that may be in flight: 1 is no overlap, 2 is the engine's overlap.
        host_pages: pages of host memory below the device's pool.
        settings: of the scheduler.
    """

    def __init__(
        self,
        *,
        shards: int,
        num_pages: int,
        depth: int,
        policy: str = "fcfs",
        host_pages: int = 0,
        settings: SchedulerSettings | None = None,
        **limits: int,
    ) -> None:
        self.policy = policy
        self.limits = limits
        self.settings = settings or SchedulerSettings()
        self.depth = depth
        self.num_pages = [num_pages] * shards
        page_size = limits["page_size"]
        self.store = (
            PageStore((page_size,), np.dtype(np.int32), host_bytes=host_pages * page_size * 4)
            if host_pages
            else None
        )
        self.pools, self.scheduler = self.make_scheduler()
        self.executor = FakeExecutor(page_size=page_size, model=MODEL, store=self.store)
        self.requests: list[Request] = []
        self.in_flight: deque[tuple[StepPlan, Any]] = deque()
        self.log: list[tuple[str, Any]] = []  # everything the scheduler was told
        self.clock = 0.0

    def make_scheduler(self) -> tuple[list[PagePool], Scheduler]:
        sharing = self.settings.prefix_cache
        pools = [PagePool(n, prefix_cache=sharing) for n in self.num_pages]
        scheduler = Scheduler(
            page_pools=pools,
            policy=make_test_policy(self.policy),
            max_waiting=50,
            store=self.store,
            settings=self.settings,
            **self.limits,
        )
        for shard in scheduler._shards:
            check_what_is_owed(shard)
        return pools, scheduler

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

    def poll(self, *, wait: bool = False) -> None:
        """Hear of pages that were fetched."""
        for done in self.executor.poll(wait=wait):
            self.log.append(("fetched", (done, self.clock)))
            self.scheduler.fetched(done, self.clock)
            self.check()

    def drain(self, max_steps: int = 2000) -> None:
        """The engine's loop: keep `depth` steps in flight until all requests are finished."""
        for _ in range(max_steps):
            launched = self.launch()
            if not launched:
                busy = self.in_flight or self.scheduler.num_fetches
                assert busy or not self.scheduler.has_work, "stuck"
            if self.in_flight and (not launched or len(self.in_flight) == self.depth):
                self.collect()
            self.poll(wait=not launched and not self.in_flight)
            if not (self.in_flight or self.scheduler.has_work or self.scheduler.num_fetches):
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
        assert self.scheduler.num_running == len(running) <= self.limits["max_num_seqs"]
        check_ranks(self.scheduler._policy, running, self.clock)

    def check_limits(self, plan: StepPlan) -> None:
        shards = len(self.pools)
        slots_per_shard = self.limits["max_num_seqs"] // shards
        for shard in range(shards):
            rows = [row for row in plan.rows if row.shard == shard]
            tokens = sum(row.num_tokens for row in rows)
            assert tokens <= self.limits["max_num_batched_tokens"] // shards
            assert all(row.slot // slots_per_shard == shard for row in rows)
            pages = [page for row in rows for page in row.page_ids]
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
        for pool in self.pools:
            assert (pool.num_used, pool.num_free + pool.num_cached) == (0, pool.num_total)
            assert self.settings.prefix_cache or not pool.num_cached
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        assert not self.scheduler.has_work

    def close(self) -> None:
        self.executor.close()
        if self.store is not None:
            self.store.check()
            self.store.close()

    def check_replay(self) -> None:
        """The same calls on a fresh scheduler give the same plans (with the same store)."""
        if self.store is not None:
            return
        _, scheduler = self.make_scheduler()
        plans: list[StepPlan] = []
        committed = 0
        for what, argument in self.log:
            if what == "add":
                scheduler.add(make_request(*argument))
            elif what == "fetched":
                scheduler.fetched(*argument)
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
    """A request of one of two tenants; many begin alike, up to a point."""
    rng = random.Random(number)
    common = random.Random(number % 3).choices(range(50), k=max(0, prompt_len - rng.choice([0, 3])))
    return Request(
        request_id=f"r{number}",
        prompt_token_ids=common + rng.choices(range(50), k=prompt_len - len(common)),
        params=SamplingParams(),
        service=ServiceParams(
            priority=number % 2, cache_salt="" if number % 7 else "own", tpot_target=3.0
        ),
        max_tokens=max_tokens,
        seed=seed,
        arrival_time=arrival_time,
        key=number,
        predicted_len=float(rng.randint(1, 40)),
    )


def check_ranks(policy: Policy, running: list[Request], now: float) -> None:
    """Asked about many requests, a policy says what it says about each."""
    assert list(policy.priorities(running, now)) == [policy.priority(r, now) for r in running]
    groups = [policy.group(request) for request in running]
    expected = [policy.group_priority(group, now) for group in groups]
    assert list(policy.group_priorities(running, now)) == expected


def check_what_is_owed(shard: Shard) -> None:
    """Whenever a request could start, what is owed to the others is up to date."""
    start = shard.start

    def checked(*args: Any) -> bool:
        owed = sum(map(shard.pages_owed, shard.running))
        assert shard.spare_pages == shard.pool.num_available - owed
        return start(*args)

    shard.start = checked  # type: ignore[method-assign]


class ShortestFirst(Policy):
    """Lets late arrivals pass, so that a decode may rank after a prompt still in progress."""

    def priority(self, request: Request, now: float) -> float:
        return len(request.prompt_token_ids)


def make_test_policy(name: str) -> Policy:
    return ShortestFirst() if name == "shortest" else make_policy(name)


ALL_POLICIES = ("shortest", *POLICIES)


class SchedulerMachine(RuleBasedStateMachine):
    """Any interleaving of arrivals, aborts, launches and collects."""

    @initialize(
        shards=st.integers(1, 2),
        depth=st.integers(1, 3),
        policy=st.sampled_from(ALL_POLICIES),
        host_pages=st.sampled_from([0, 0, 2, 30]),
        switches=st.fixed_dictionaries(
            {
                "prefix_cache": st.booleans(),
                "starvation_timeout": st.sampled_from([5.0, 1000.0]),
                "admission": st.sampled_from(["current", "predicted", "max"]),
                "preemption": st.sampled_from(["auto", "recompute", "swap"]),
                "prefill_first": st.booleans(),
                "slice_tokens": st.sampled_from([None, 1, 3]),
            }
        ),
        num_pages=st.integers(3, 14),
        page_size=st.sampled_from([1, 2, 4]),
        seqs_per_shard=st.integers(1, 4),
        tokens_per_shard=st.integers(1, 12),
    )
    def start(
        self,
        shards: int,
        depth: int,
        policy: str,
        host_pages: int,
        switches: dict[str, Any],
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
            host_pages=host_pages,
            settings=SchedulerSettings(**switches),
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
        launched, scheduler = self.bench.launch(), self.bench.scheduler
        busy = launched or self.bench.in_flight or scheduler.num_fetches
        assert busy or not scheduler.has_work, "stuck"

    @rule(wait=st.booleans())
    def poll(self, wait: bool) -> None:
        self.bench.poll(wait=wait)

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
            self.bench.close()


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50)
TestSchedulerMachine = SchedulerMachine.TestCase


@pytest.mark.parametrize("host_pages", [0, 40])
@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_busy_server_under_memory_pressure(policy: str, host_pages: int) -> None:
    rng = random.Random(f"{policy} {host_pages}")
    shards, depth, num_batched_tokens = rng.choice([1, 2]), rng.choice([1, 2]), rng.choice([8, 64])
    bench = Bench(
        shards=shards,
        num_pages=20,
        depth=depth,
        policy=policy,
        host_pages=host_pages,
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
        bench.poll()
    bench.drain()
    bench.check_results()
    bench.check_replay()
    bench.close()
    assert len(bench.requests) > 30
    assert bench.scheduler.num_preemptions > 0, "the pool was meant to be too small"
    counts = bench.scheduler.cache_counts
    assert counts.device_hit_tokens > 0 and (counts.store_hit_tokens > 0) == (host_pages > 0)
    started = [r for r in bench.requests if r.started_time is not None]
    assert counts.queried_tokens == sum(len(r.prompt_token_ids) for r in started), "once each"
    assert counts.device_hit_tokens + counts.store_hit_tokens <= counts.queried_tokens


@pytest.mark.parametrize(
    "policy", ["shortest", *(n for n in POLICIES if make_policy(n).traits.ages)]
)
def test_nobody_starves_while_preferred_requests_keep_coming(policy: str) -> None:
    """A long request among short ones that never stop and rank before it, in every policy."""
    timeout = 30.0
    bench = Bench(
        shards=1,
        num_pages=12,
        depth=2,
        policy=policy,
        settings=SchedulerSettings(starvation_timeout=timeout, slice_tokens=4),
        page_size=4,
        max_num_seqs=2,
        max_num_batched_tokens=8,
        max_model_len=48,
    )
    bench.add(30, 10)
    [late] = bench.requests
    late.service = ServiceParams(priority=5)
    late.predicted_len = 1000.0
    steps = 0
    while not late.is_finished:
        if bench.scheduler.num_waiting < 3:
            bench.add(2, 4, seed=steps)
        if not bench.launch() or len(bench.in_flight) == bench.depth:
            bench.collect()
        steps += 1
        assert steps < 400, "starved"
    bench.drain()
    bench.check_results()


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
