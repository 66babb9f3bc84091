"""Virtual token counters against the paper's algorithm, kept the dumb way, and its bound."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.errors import ConfigError
from jaxserve.core.request import Request
from jaxserve.scheduling.policies import Policy, PolicySettings, make_policy
from jaxserve.scheduling.policies.vtc import VirtualTokenCounter
from tests.scheduling.policies.simulation import Simulation, make_request, serve


def make_vtc(**weights: float) -> VirtualTokenCounter:
    return VirtualTokenCounter(PolicySettings(tenant_weights=weights))


def arrive(policy: Policy, tenant: str, prompt_len: int = 10, answer_len: int = 100) -> Request:
    request = make_request(prompt_len, answer_len, tenant=tenant)
    policy.arrived(request, 0.0)
    return request


def test_prompt_tokens_cost_one_and_answer_tokens_two_over_the_weight() -> None:
    policy = make_vtc(gold=4.0)
    for tenant, weight in (("gold", 4.0), ("other", 1.0)):
        request = arrive(policy, tenant)
        before = policy.group_priority(tenant, 0.0)
        serve(policy, request, 6)
        assert policy.group_priority(tenant, 0.0) == before + 6 / weight
        serve(policy, request, 4)  # and the first token
        assert policy.group_priority(tenant, 0.0) == before + 12 / weight
        serve(policy, request, 1)
        assert policy.group_priority(tenant, 0.0) == before + 14 / weight


def test_cached_tokens_and_tokens_computed_again_are_free() -> None:
    policy = make_vtc()
    request = arrive(policy, "a")
    request.num_computed_tokens = request.num_cached_tokens = 4
    serve(policy, request, 3)
    assert policy.group_priority("a", 0.0) == 3
    request.num_computed_tokens = request.num_cached_tokens = 0  # preempted, and nothing cached
    serve(policy, request, 9)
    assert policy.group_priority("a", 0.0) == 3 + 2
    serve(policy, request, 1)
    serve(policy, request, 1)
    assert policy.group_priority("a", 0.0) == 3 + 3 + 2 * 2
    request.num_computed_tokens = 0
    serve(policy, request, 12)
    assert policy.group_priority("a", 0.0) == 3 + 3 + 3 * 2


def test_tenants_are_groups_and_their_requests_go_by_arrival() -> None:
    policy = make_vtc()
    old, new = (make_request(tenant="a", arrival=t) for t in (1.0, 2.0))
    for request in (old, new):
        policy.arrived(request, 2.0)
    assert policy.group(old) == policy.group(new) == "a"
    assert (policy.priority(old, 3.0), policy.priority(new, 3.0)) == (1.0, 2.0)


def test_idling_earns_no_credit() -> None:
    policy = make_vtc()
    for tenant in ("a", "b"):
        arrive(policy, tenant)  # one more, which waits for ever
    serve(policy, arrive(policy, "a", 100), 100)
    serve(policy, arrive(policy, "b", 300), 300)
    arrive(policy, "c")
    assert policy.group_priority("c", 0.0) == policy.group_priority("a", 0.0) == 102


def test_an_empty_queue_is_remembered_by_who_left_it_last() -> None:
    policy = make_vtc()
    request = arrive(policy, "a", 100)
    serve(policy, request, 100)
    policy.finished(request)
    assert not policy._accounts  # it would come back to the same counter
    arrive(policy, "b")
    assert policy.group_priority("b", 0.0) == 102


def test_a_tenant_ahead_of_the_rest_is_remembered_until_they_catch_up() -> None:
    policy = make_vtc()
    arrive(policy, "a")  # one that keeps waiting
    running = arrive(policy, "a", 1000)
    for _ in range(2):  # b comes and goes, served 100 + 2 each time
        serve(policy, request := arrive(policy, "b", 100), 100)
        policy.finished(request)
    for served in (100, 100, 10):
        policy.finished(arrive(policy, "c"))  # whoever leaves is the occasion to look around
        assert policy.group_priority("b", 0.0) == 204 and policy.group_priority("a", 0.0) < 204
        serve(policy, running, served)
    policy.finished(arrive(policy, "c"))
    assert policy._accounts.keys() == {"a"}


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_weights_must_be_positive(weight: float) -> None:
    with pytest.raises(ConfigError, match="tenant 'a'"):
        make_policy("vtc", PolicySettings(tenant_weights={"a": weight}))


class DumbCounters:
    """Algorithm 2 of the paper, with every tenant remembered and every minimum looked for."""

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        self.waiting: list[Request] = []
        self.last_left: str | None = None

    def join(self, request: Request) -> None:
        tenant, tenants = request.service.tenant, {r.service.tenant for r in self.waiting}
        counter = self.counters.setdefault(tenant, 0.0)
        if not tenants and self.last_left is not None:
            counter = max(counter, self.counters[self.last_left])
        elif tenants and tenant not in tenants:
            counter = max(counter, min(self.counters[t] for t in tenants))
        self.counters[tenant] = counter
        self.waiting.append(request)

    def leave(self, request: Request) -> None:
        if request in self.waiting:
            self.waiting.remove(request)
            tenant = request.service.tenant
            if all(r.service.tenant != tenant for r in self.waiting):
                self.last_left = tenant


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from("AASSSSPF"), st.integers(0, 7)), max_size=80))
def test_counters_are_those_of_the_paper_and_idle_tenants_are_forgotten(
    operations: list[tuple[str, int]],
) -> None:
    policy, dumb = make_vtc(t1=2.0), DumbCounters()
    unfinished: list[Request] = []
    for what, number in operations:
        if what == "A":
            request = arrive(policy, f"t{number % 4}", prompt_len=3 + number)
            policy.priority(request, 0.0)
            dumb.join(request)
            unfinished.append(request)
            continue
        if not unfinished:
            continue
        request = unfinished[number % len(unfinished)]
        tenant = request.service.tenant
        if what == "S":
            dumb.leave(request)
            tokens = min(1 + number, request.num_tokens - request.num_computed_tokens)
            weight = 2.0 if tenant == "t1" else 1.0
            prompt_len = len(request.prompt_token_ids)
            was = request.num_output_tokens, request.num_computed_tokens
            serve(policy, request, tokens)
            if not request.num_preemptions:  # computes everything for the first time
                fresh = min(request.num_computed_tokens, prompt_len) - min(was[1], prompt_len)
                charge = fresh + 2 * (request.num_output_tokens - was[0])
                dumb.counters[tenant] += charge / weight
            else:
                request.num_preemptions = 1  # see "P"
                dumb.counters[tenant] += 2 * (request.num_output_tokens - was[0]) / weight
        elif what == "P" and request not in dumb.waiting:
            if request.num_computed_tokens < len(request.prompt_token_ids):
                continue  # so that what is computed again is all of the prompt
            request.num_computed_tokens = 0
            request.num_preemptions += 1
            policy.priority(request, 0.0)
            dumb.join(request)
        elif what == "F":
            dumb.leave(request)
            policy.finished(request)
            unfinished.remove(request)
        for waiting in dumb.waiting:
            tenant = waiting.service.tenant
            assert policy.group_priority(tenant, 0.0) == dumb.counters[tenant]
        _check_memory(policy, dumb, unfinished)


def _check_memory(
    policy: VirtualTokenCounter, dumb: DumbCounters, unfinished: list[Request]
) -> None:
    active = {r.service.tenant for r in unfinished}
    assert policy._charges.keys() == {r.key for r in unfinished}
    assert active <= policy._accounts.keys()
    for tenant in policy._accounts.keys() - active:
        assert policy.group_priority(tenant, 0.0) == dumb.counters[str(tenant)]
    for tenant in dumb.counters.keys() - policy._accounts.keys():
        assert dumb.counters[tenant] <= policy._floor()  # it would be lifted beyond it anyway
    assert len(policy._queue) <= 4 + len(policy._accounts)
    assert len(policy._idle) <= len(policy._accounts)


def test_tenants_that_come_once_do_not_pile_up() -> None:
    policy = make_vtc()
    rng = random.Random(0)
    simulation = Simulation(policy, slots=4, budget=50)
    for number in range(1000):  # as many as can just be served, and some are aborted
        simulation.add(make_request(10, 3, tenant=f"once {number}", arrival=simulation.now))
        if simulation.waiting and rng.random() < 0.1:
            simulation.abort(rng.choice(simulation.waiting))
        if number % 20 == 0:
            simulation.add(make_request(30, 30, tenant="steady", arrival=simulation.now))
        simulation.step()
        unfinished = len(simulation.waiting) + len(simulation.running)
        assert len(policy._accounts) <= unfinished + 50
        assert len(policy._queue) <= unfinished + 50 and len(policy._idle) <= 50


def test_the_rank_of_an_unknown_tenant_is_where_it_would_join() -> None:
    policy = make_vtc()
    serve(policy, arrive(policy, "a", 100), 100)
    arrive(policy, "a")
    assert policy.group_priority("nobody", 0.0) == policy.group_priority("a", 0.0)


class Ledger(Simulation):
    """Keeps account of what every tenant was served."""

    def __init__(self, policy: Policy, weights: dict[str, float], **limits: int) -> None:
        super().__init__(policy, **limits)  # pyright: ignore[reportArgumentType]
        self.weights = weights
        self.service: dict[str, float] = {}

    def _serve(self, request: Request, num_tokens: int) -> None:
        super()._serve(request, num_tokens)
        is_prompt = request.num_computed_tokens <= len(request.prompt_token_ids)
        cost = (num_tokens if is_prompt else 0) + 2 * request.num_pending_tokens
        tenant = request.service.tenant
        share = cost / self.weights.get(tenant, 1.0)
        self.service[tenant] = self.service.get(tenant, 0.0) + share


def spread_while_backlogged(
    name: str, requests: list[Request], weights: dict[str, float], *, slots: int, budget: int
) -> tuple[float, float]:
    """How far the service of tenants a and b moved apart while both had requests waiting.

    Returns:
        The most by which their (weighted) services differed over any interval in which both
        were backlogged all the time, and the most tokens that a batch can have.
    """
    policy = make_policy(name, PolicySettings(tenant_weights=weights))
    simulation = Ledger(policy, weights, slots=slots, budget=budget)
    arrivals = sorted(requests, key=lambda r: r.arrival_time)
    lows, highs, spread = [], [], 0.0
    while arrivals or simulation.waiting or simulation.running:
        while arrivals and arrivals[0].arrival_time <= simulation.now:
            simulation.add(arrivals.pop(0))
        if {"a", "b"} <= {r.service.tenant for r in simulation.waiting}:
            difference = simulation.service.get("a", 0.0) - simulation.service.get("b", 0.0)
            lows.append(difference)
            highs.append(difference)
            spread = max(spread, max(highs) - min(lows))
        else:
            lows, highs = [], []
        simulation.step()
    sizes = sorted(len(r.prompt_token_ids) + r.max_tokens for r in requests)
    return spread, sum(sizes[-slots:])


lengths = st.tuples(st.integers(1, 40), st.integers(1, 20))


@settings(max_examples=150, deadline=None)
@given(
    a=st.lists(lengths, min_size=5, max_size=30),
    b=st.lists(lengths, min_size=5, max_size=30),
    others=st.lists(st.tuples(lengths, st.integers(0, 60)), max_size=10),
    late=st.integers(0, 40),
    weight=st.sampled_from([1.0, 2.0, 5.0]),
    slots=st.integers(1, 4),
    budget=st.integers(4, 50),
)
def test_service_of_backlogged_tenants_stays_within_the_bound(
    a: list[tuple[int, int]],
    b: list[tuple[int, int]],
    others: list[tuple[tuple[int, int], int]],
    late: int,
    weight: float,
    slots: int,
    budget: int,
) -> None:
    requests = [make_request(*size, tenant="a") for size in a]
    requests += [make_request(*size, tenant="b", arrival=late) for size in b]
    requests += [make_request(*size, tenant="c", arrival=when) for size, when in others]
    spread, batch = spread_while_backlogged(
        "vtc", requests, {"a": weight}, slots=slots, budget=max(budget, slots)
    )
    longest = max(len(r.prompt_token_ids) for r in requests)
    assert spread <= 2 * max(longest, 2 * batch)


def flood() -> list[Request]:
    """Two tenants, one of which sends ten times as much."""
    rng = random.Random(1)
    return [
        make_request(rng.randint(1, 20), rng.randint(1, 10), tenant=tenant, arrival=0.0)
        for tenant in "aaaaaaaaaab" * 12
    ]


def test_a_flood_gets_its_share_and_no_more_where_fcfs_gives_it_all() -> None:
    vtc, batch = spread_while_backlogged("vtc", flood(), {}, slots=4, budget=30)
    fcfs, _ = spread_while_backlogged("fcfs", flood(), {}, slots=4, budget=30)
    bound = 2 * 2 * batch
    assert vtc <= bound < fcfs / 5


def test_no_throughput_is_lost_and_a_tenant_alone_gets_everything() -> None:
    def duration(name: str, requests: list[Request]) -> float:
        simulation = Simulation(make_policy(name), slots=4, budget=30)
        simulation.run(requests)
        return simulation.now

    assert duration("vtc", flood()) == pytest.approx(duration("fcfs", flood()), rel=0.02)
    alone = [[r for r in flood() if r.service.tenant == "a"] for _ in range(2)]
    assert duration("vtc", alone[0]) == duration("fcfs", alone[1])
