"""The scheduler's rules one by one: who is served, admitted, preempted, refused."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from jaxserve.cache import PagePool
from jaxserve.core.errors import ConfigError, InvalidRequest, QueueFull
from jaxserve.core.request import FinishReason, Request, RequestState
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.step import StepPlan, StepResult
from jaxserve.scheduling import Scheduler
from jaxserve.scheduling.policies import Policy, Traits, make_policy
from jaxserve.scheduling.settings import SchedulerSettings

_arrivals = itertools.count()


def make_request(prompt_len: int, max_tokens: int = 8) -> Request:
    number = next(_arrivals)
    return Request(
        request_id=f"r{number}",
        prompt_token_ids=list(range(100, 100 + prompt_len)),
        params=SamplingParams(),
        max_tokens=max_tokens,
        seed=number,
        arrival_time=float(number),
    )


def make_scheduler(
    *, num_pages: int = 100, shards: int = 1, prefix_cache: bool = False, **limits: Any
) -> Scheduler:
    defaults = {
        "page_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        "max_waiting": 100,
        "policy": make_policy("fcfs"),
        "settings": SchedulerSettings(prefix_cache=prefix_cache),
    }
    pools = [PagePool(num_pages, prefix_cache=prefix_cache) for _ in range(shards)]
    return Scheduler(page_pools=pools, **(defaults | limits))


def make_plan(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.plan(1000.0)
    scheduler.check()
    assert plan is not None
    return plan


def commit(
    scheduler: Scheduler,
    plan: StepPlan,
    token: int = 5,
    finished: Mapping[int, FinishReason] | None = None,
) -> None:
    tokens = np.array([token if row.samples else -1 for row in plan.rows], np.int32)
    scheduler.commit(plan, StepResult(tokens), finished or {})
    scheduler.check()


def spans(plan: StepPlan) -> dict[int, tuple[int, int, bool]]:
    return {row.key: (row.start, row.num_tokens, row.samples) for row in plan.rows}


def test_decodes_come_first_and_a_prompt_takes_what_is_left() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    short, long = make_request(3), make_request(25)
    scheduler.add(short)
    plan = make_plan(scheduler)
    assert spans(plan) == {short.key: (0, 3, True)}
    assert plan.rows[0].token_ids == (100, 101, 102)
    commit(scheduler, plan, token=5)
    scheduler.add(long)
    for decode_start, (start, n, samples) in enumerate(
        [(0, 9, False), (9, 9, False), (18, 7, True)]
    ):
        plan = make_plan(scheduler)
        assert spans(plan) == {
            short.key: (3 + decode_start, 1, True),
            long.key: (start, n, samples),
        }
        assert [row.key for row in plan.rows] == [short.key, long.key]
        commit(scheduler, plan, token=6 + decode_start)
    assert short.output_token_ids == [5, 6, 7, 8]
    assert long.output_token_ids == [8]


def test_overlap_leaves_the_pending_token_to_the_device() -> None:
    scheduler = make_scheduler()
    request = make_request(5, max_tokens=3)
    scheduler.add(request)
    first = make_plan(scheduler)
    second = make_plan(scheduler)
    row = second.rows[0]
    assert (row.start, row.num_tokens, row.token_ids, row.samples) == (5, 1, (), True)
    assert request.num_pending_tokens == 2
    commit(scheduler, first, token=41)
    third = make_plan(scheduler)
    assert third.rows[0].token_ids == () and third.rows[0].start == 6
    commit(scheduler, second, token=42)
    assert scheduler.plan(0.0) is None, "all three tokens are launched"
    commit(scheduler, third, 43, {request.key: FinishReason.LENGTH})
    assert request.output_token_ids == [41, 42, 43]
    assert request.finish_reason is FinishReason.LENGTH and not scheduler.has_work


def test_a_token_that_follows_the_end_is_dropped() -> None:
    scheduler = make_scheduler()
    request = make_request(5)
    scheduler.add(request)
    first, second = make_plan(scheduler), make_plan(scheduler)
    commit(scheduler, first, 41, {request.key: FinishReason.STOP})
    assert request.is_finished and request.num_pending_tokens == 0
    commit(scheduler, second, 42)
    assert request.output_token_ids == [41]


def test_pages_of_a_request_that_only_awaits_its_last_commit_are_free() -> None:
    scheduler = make_scheduler(num_pages=2)
    first, second = make_request(7, max_tokens=1), make_request(7, max_tokens=1)
    scheduler.add(first)
    scheduler.add(second)
    plan = make_plan(scheduler)
    assert spans(plan) == {first.key: (0, 7, True)}
    overlapped = make_plan(scheduler)
    assert spans(overlapped) == {second.key: (0, 7, True)}
    assert overlapped.rows[0].slot != plan.rows[0].slot
    assert scheduler.num_preemptions == 0


def test_context_length_ends_a_request_before_max_tokens() -> None:
    scheduler = make_scheduler(max_model_len=6)
    request = make_request(4, max_tokens=50)
    scheduler.add(request)
    plans = [make_plan(scheduler), make_plan(scheduler)]
    assert scheduler.plan(0.0) is None
    commit(scheduler, plans[0])
    with pytest.raises(ValueError, match="over but not finished"):
        commit(scheduler, plans[1])


def test_the_last_to_come_is_preempted_and_keeps_its_place() -> None:
    scheduler = make_scheduler(num_pages=4, max_num_batched_tokens=8)
    first, second, third = make_request(4), make_request(4), make_request(1)
    for request in (first, second, third):
        scheduler.add(request)
    plan = make_plan(scheduler)
    assert set(spans(plan)) == {first.key, second.key}, "room is left for both to grow"
    commit(scheduler, plan, token=1)
    for token in range(2, 6):
        commit(scheduler, make_plan(scheduler), token)
    overlapped = make_plan(scheduler)  # position 8 of the first needs a third page
    assert set(spans(overlapped)) == {first.key}
    assert second.state is RequestState.WAITING and second.num_preemptions == 1
    assert (second.slot, second.page_ids, second.num_computed_tokens) == (None, (), 0)
    assert scheduler.num_preemptions == 1 and scheduler.num_waiting == 2
    commit(scheduler, overlapped, 6, {first.key: FinishReason.STOP})
    resumed = make_plan(scheduler)
    assert next(iter(spans(resumed).items())) == (second.key, (0, 8, False)), "before the third"
    assert resumed.rows[0].token_ids == (100, 101, 102, 103, 1, 2, 3, 4)
    commit(scheduler, resumed)
    assert spans(make_plan(scheduler))[second.key] == (8, 1, True)


def test_a_preempted_request_waits_for_its_pending_tokens() -> None:
    scheduler = make_scheduler(num_pages=4)
    first, second = make_request(4), make_request(4)
    scheduler.add(first)
    scheduler.add(second)
    commit(scheduler, make_plan(scheduler))
    for _ in range(3):
        commit(scheduler, make_plan(scheduler))
    launched = make_plan(scheduler)
    overlapped = make_plan(scheduler)
    assert set(spans(overlapped)) == {first.key} and second.num_pending_tokens == 1
    scheduler.abort(first.request_id)  # the pages are there, the value of the token is not
    assert scheduler.plan(0.0) is None
    commit(scheduler, launched, token=9)
    assert second.output_token_ids[-1] == 9 and second.num_pending_tokens == 0
    assert spans(make_plan(scheduler)) == {second.key: (0, 9, True)}


def test_a_preempted_request_may_end_with_its_pending_token() -> None:
    scheduler = make_scheduler(num_pages=4)
    first, second = make_request(4), make_request(4)
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(4):
        commit(scheduler, make_plan(scheduler))
    launched, _ = make_plan(scheduler), make_plan(scheduler)
    assert second.state is RequestState.WAITING
    commit(scheduler, launched, 9, {second.key: FinishReason.STOP})
    assert second.is_finished and scheduler.num_waiting == 0


def test_a_preempted_request_moves_to_a_free_shard_in_the_next_step() -> None:
    scheduler = make_scheduler(num_pages=4, shards=2, max_num_seqs=4, max_num_batched_tokens=32)
    first, other, second = make_request(4), make_request(12, max_tokens=5), make_request(4)
    for request in (first, other, second):
        scheduler.add(request)
    plan = make_plan(scheduler)
    assert [first.shard, other.shard, second.shard] == [0, 1, 0]
    for _ in range(4):
        commit(scheduler, plan)
        plan = make_plan(scheduler)
    scheduler.abort(other.request_id)
    commit(scheduler, plan)
    plan = make_plan(scheduler)
    assert set(spans(plan)) == {first.key} and second.state is RequestState.WAITING
    commit(scheduler, plan)
    plan = make_plan(scheduler)
    assert spans(plan)[second.key] == (0, 9, True) and second.shard == 1


def test_a_row_of_this_step_is_not_taken_back_for_a_prompt_before_it() -> None:
    class LongestFirst(Policy):
        traits = Traits(ages=False)

        def priority(self, request: Request, now: float) -> float:
            return -len(request.prompt_token_ids)

    scheduler = make_scheduler(
        num_pages=12, page_size=1, max_num_batched_tokens=2, policy=LongestFirst()
    )
    decode, prompt = make_request(1, max_tokens=12), make_request(7, max_tokens=1)
    scheduler.add(decode)
    commit(scheduler, make_plan(scheduler))
    scheduler.add(prompt)
    for _ in range(5):  # both take one page in each step
        plan = make_plan(scheduler)
        assert set(spans(plan)) == {decode.key, prompt.key}
        commit(scheduler, plan)
    plan = make_plan(scheduler)  # the decode gets the last page, so the prompt sits out
    assert spans(plan) == {decode.key: (6, 1, True)} and scheduler.num_preemptions == 0
    assert prompt.state is RequestState.RUNNING and len(prompt.page_ids) == 5
    commit(scheduler, plan)
    assert spans(make_plan(scheduler)) == {prompt.key: (5, 2, True)}
    assert decode.state is RequestState.WAITING and decode.num_preemptions == 1


def test_abort_frees_at_once_in_every_state() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = make_request(4), make_request(4)
    scheduler.add(running)
    scheduler.add(waiting)
    plan = make_plan(scheduler)
    assert scheduler.get(running.request_id) is running
    assert scheduler.abort(running.request_id) and scheduler.abort(waiting.request_id)
    scheduler.check()
    assert not scheduler.has_work
    assert scheduler.get(running.request_id) is scheduler.get_by_key(running.key) is None
    assert running.finish_reason is waiting.finish_reason is FinishReason.ABORT
    assert (running.page_ids, running.slot) == ((), None)
    assert not scheduler.abort(running.request_id) and not scheduler.abort("unknown")
    commit(scheduler, plan)
    assert running.output_token_ids == []


def test_admission_spreads_over_shards_and_their_slots() -> None:
    scheduler = make_scheduler(shards=2, max_num_seqs=4, max_num_batched_tokens=32)
    requests = [make_request(4) for _ in range(5)]
    for request in requests:
        scheduler.add(request)
    plan = make_plan(scheduler)
    assert [(row.shard, row.slot) for row in plan.rows] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert [request.shard for request in requests[:4]] == [0, 1, 0, 1]
    assert (scheduler.num_running, scheduler.num_waiting) == (4, 1)


def test_a_large_request_is_not_overtaken() -> None:
    scheduler = make_scheduler(num_pages=8, max_num_batched_tokens=64)
    small, large, late = make_request(8), make_request(24), make_request(1)
    for request in (small, large, late):
        scheduler.add(request)
    plan = make_plan(scheduler)
    assert set(spans(plan)) == {small.key}, "6 pages are free, but one is owed to the small"
    commit(scheduler, plan, 5, {small.key: FinishReason.STOP})
    assert large.key in spans(make_plan(scheduler))


def test_nobody_waits_for_pages_that_can_never_be_asked_for() -> None:
    scheduler = make_scheduler(num_pages=12, max_num_seqs=4, max_num_batched_tokens=64)
    for _ in range(4):  # each fills 3 pages of 4 tokens, its last answer token without KV
        scheduler.add(make_request(9, max_tokens=4))
    make_plan(scheduler)
    assert scheduler.num_running == 4


def test_refusals() -> None:
    scheduler = make_scheduler(num_pages=4, max_model_len=20, max_waiting=2)
    request = make_request(3)
    scheduler.add(request)
    for bad, message in [
        (request, "already in use"),
        (make_request(0), "the prompt is empty"),
        (make_request(20), "leaves no room"),
        (make_request(3, max_tokens=0), "max_tokens"),
        (make_request(10, max_tokens=8), "do not fit the KV cache of 16 tokens"),
    ]:
        with pytest.raises(InvalidRequest, match=message):
            scheduler.add(bad)
    scheduler.add(make_request(10, max_tokens=7))  # 17 tokens, of which 16 need KV
    with pytest.raises(QueueFull):
        scheduler.add(make_request(3))
    scheduler.check()
    assert scheduler.num_waiting == 2


@pytest.mark.parametrize(
    "limits",
    [{"max_num_seqs": 3}, {"max_num_seqs": 0}, {"max_num_batched_tokens": 1}],
)
def test_limits_that_cannot_be_split_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make_scheduler(shards=2, **limits)


def test_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="fcfs"):
        make_policy("lottery")


def test_another_policy_orders_admission_and_preemption() -> None:
    class ShortestFirst(Policy):
        traits = Traits(ages=False)

        def priority(self, request: Request, now: float) -> float:
            return len(request.prompt_token_ids)

    scheduler = make_scheduler(num_pages=4, max_num_seqs=2, policy=ShortestFirst())
    long, short, middle = make_request(8), make_request(3), make_request(4)
    for request in (long, short, middle):
        scheduler.add(request)
    plan = make_plan(scheduler)
    assert [row.key for row in plan.rows] == [short.key, middle.key]
    for _ in range(6):
        commit(scheduler, plan)
        plan = make_plan(scheduler)
    assert middle.num_preemptions == 1 and short.num_preemptions == 0
