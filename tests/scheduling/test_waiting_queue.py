"""The waiting queue against a sorted list."""

from collections.abc import Hashable

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.request import Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.scheduling.policies import Policy, Traits
from jaxserve.scheduling.ranking import Ranking
from jaxserve.scheduling.waiting_queue import WaitingQueue

TIMEOUT = 20.0
GROUPS: tuple[str, ...] = ("a", "b", "c")


class Shares(Policy):
    """Groups with counters that only rise; within a group, by priority."""

    traits = Traits(has_groups=True, refreshes=True)

    def __init__(self, *, ages: bool = True, refreshes: bool = False) -> None:
        self.traits = Traits(has_groups=True, ages=ages, refreshes=refreshes)
        self.counters: dict[str, float] = dict.fromkeys(GROUPS, 0.0)

    def priority(self, request: Request, now: float) -> float:
        return request.service.priority

    def group(self, request: Request) -> Hashable:
        return request.service.tenant

    def group_priority(self, group: Hashable, now: float) -> float:
        assert isinstance(group, str)
        return self.counters[group]


def make_request(key: int, priority: int, group: str = "a", arrival: float = 0.0) -> Request:
    return Request(
        request_id=str(key),
        prompt_token_ids=[1],
        params=SamplingParams(),
        service=ServiceParams(tenant=group, priority=priority),
        max_tokens=1,
        key=key,
        arrival_time=arrival,
        last_progress=arrival,
    )


def expected_first(waiting: list[Request], policy: Shares, now: float) -> Request | None:
    for request in waiting:
        if policy.traits.ages and request.last_progress + TIMEOUT <= now:
            request.is_overdue = True
    overdue = [r for r in waiting if r.is_overdue]
    if overdue:
        return min(overdue, key=lambda r: (r.arrival_time, r.key))
    if not waiting:
        return None
    # Of groups that tie, any may go first, but within it the order is given.
    lowest = min(policy.counters[r.service.tenant] for r in waiting)
    firsts = [
        min(
            (r for r in waiting if r.service.tenant == g), key=lambda r: (r.service.priority, r.key)
        )
        for g in {r.service.tenant for r in waiting}
        if policy.counters[g] == lowest
    ]
    return firsts[0] if len(firsts) == 1 else None


operations = st.tuples(
    st.sampled_from(["push", "push", "pop", "discard", "move", "raise", "wait"]),
    st.integers(0, 9),
    st.sampled_from(GROUPS),
)


@given(st.lists(operations), st.booleans())
def test_order_is_that_of_a_sorted_list(script: list[tuple[str, int, str]], ages: bool) -> None:
    policy, now = Shares(ages=ages), 0.0
    queue, waiting = WaitingQueue(Ranking(policy, TIMEOUT)), []
    for key, (what, number, group) in enumerate(script):
        now += 1
        if what == "push":
            request = make_request(key, number, group, now)
            queue.push(request, now)
            waiting.append(request)
        elif what == "raise":
            policy.counters[group] += number
        elif what == "wait":
            now += number
        elif waiting:
            request = waiting[number % len(waiting)]
            if what == "move" and not request.is_overdue:
                request.service = ServiceParams(tenant=request.service.tenant, priority=number)
                queue.push(request, now)
            elif what != "move":
                if what == "pop":
                    entry = queue.peek(now)
                    assert entry is not None
                    request = entry.request
                waiting.remove(request)
                queue.discard(request)
                assert request not in queue
        assert len(queue) == len(waiting)
        first, entry = expected_first(waiting, policy, now), queue.peek(now)
        assert (entry is None) == (not waiting)
        if entry is not None and first is not None:
            assert entry.request is first


def test_abandoned_requests_do_not_pile_up_behind_a_blocked_head() -> None:
    queue = WaitingQueue(Ranking(Shares(), TIMEOUT))
    queue.push(make_request(0, 0), 0.0)
    for key in range(1, 1000):
        request = make_request(key, key)
        queue.push(request, 0.0)
        queue.discard(request)
    assert len(queue) == 1
    assert len(queue._groups["a"]) < 100 and len(queue._due) < 100


def test_refresh_takes_turns_and_moves_those_whose_rank_has_changed() -> None:
    policy = Shares(refreshes=True)
    queue = WaitingQueue(Ranking(policy, TIMEOUT))
    requests = [make_request(key, 10 + key) for key in range(7)]
    for request in requests:
        queue.push(request, 0.0)
    queue.discard(requests[2])
    seen: list[int] = []
    for _ in range(4):
        queue.refresh(0.0, 3, lambda request: seen.append(request.key))
    assert set(seen) == {0, 1, 3, 4, 5, 6}
    requests[5].service = ServiceParams(tenant="a", priority=1)
    for _ in range(3):
        queue.refresh(0.0, 3, lambda request: None)
    entry = queue.peek(0.0)
    assert entry is not None and entry.request is requests[5]


def test_refresh_moves_a_first_that_is_first_no_more_at_once() -> None:
    policy = Shares(refreshes=True)
    queue = WaitingQueue(Ranking(policy, TIMEOUT))
    requests = [make_request(key, key) for key in range(100)]
    for request in requests:
        queue.push(request, 0.0)
    for request in requests[:2]:
        request.service = ServiceParams(tenant="a", priority=1000)
    queue.refresh(0.0, 3, lambda request: None)
    entry = queue.peek(0.0)
    assert entry is not None and entry.request is requests[2]
