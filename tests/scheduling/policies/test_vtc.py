"""Virtual token counters: tenants are groups, and what they are served stays in the bound."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.request import Request
from jaxserve.scheduling.policies import Policy, PolicySettings, make_policy
from tests.scheduling.policies.simulation import Simulation, make_request, serve


def arrive(policy: Policy, tenant: str, prompt_len: int = 10, answer_len: int = 100) -> Request:
    request = make_request(prompt_len, answer_len, tenant=tenant)
    policy.arrived(request, 0.0)
    return request


def test_tenants_are_groups_and_their_requests_go_by_arrival() -> None:
    policy = make_policy("vtc")
    old, new = (make_request(tenant="a", arrival=t) for t in (1.0, 2.0))
    for request in (old, new):
        policy.arrived(request, 2.0)
    assert policy.group(old) == policy.group(new) == "a"
    assert (policy.priority(old, 3.0), policy.priority(new, 3.0)) == (1.0, 2.0)


def test_a_tenant_whose_request_is_preempted_has_one_waiting() -> None:
    policy = make_policy("vtc")
    running = arrive(policy, "a")
    serve(policy, running, 10)
    other = arrive(policy, "b", 100)
    serve(policy, other, 50)
    arrive(policy, "b")
    assert policy.group_priority("a", 0.0) == 12  # it has none waiting, so its place is its own
    policy.priority(running, 0.0)
    assert policy.group_priority("a", 0.0) == 12
    policy.preempted(running, 0.0)
    assert policy.group_priority("a", 0.0) == policy.group_priority("b", 0.0) == 62


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


@settings(max_examples=150)
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
