"""What every policy owes: all are served, nobody starves, nothing is remembered of the finished."""

import inspect
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.cache.page_keys import extend_keys, root_key
from jaxserve.core.request import Request
from jaxserve.scheduling.policies import POLICIES, Policy, make_policy
from tests.scheduling.policies.simulation import Simulation, bursty, make_request

# Under these the starvation timeout is what saves the victim below.
NEED_THE_TIMEOUT = ("sjf", "srtf", "ltr", "mlfq", "deadline", "lpm")


def num_books(books: object) -> int:
    """Entries in all containers of a policy, and of the rooms that it keeps books in."""
    count = 0
    for value in vars(books).values():
        if isinstance(value, dict | list | set):
            count += len(value)
        elif type(value).__module__.startswith("jaxserve.scheduling") and hasattr(
            value, "__dict__"
        ):
            count += num_books(value)
    return count


def random_request(rng: random.Random, now: float) -> Request:
    request = make_request(
        rng.choice([1, 5, 30, 300]),
        rng.choice([1, 3, 10, 40]),
        arrival=now,
        predicted=rng.choice([None, 1.0, 7.5, 30.0]),
        tenant=rng.choice("abc"),
        priority=rng.randint(-2, 2),
        ttft_target=rng.choice([None, 1.0, 30.0]),
        tpot_target=rng.choice([None, 0.5, 3.0]),
    )
    request.cached_estimate = rng.randrange(len(request.prompt_token_ids))
    request.prompt_token_ids[0] = rng.randrange(4)
    extend_keys(request.page_keys, root_key(), request.prompt_token_ids, 4)
    return request


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_one_file_of_at_most_sixty_lines(name: str) -> None:
    source = inspect.getsourcefile(type(make_policy(name)))
    assert source is not None and len(Path(source).read_text().splitlines()) <= 60


def test_a_method_that_would_never_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="Greedy has `displaces`, but its traits not `displaces`"):

        class Greedy(Policy):
            def priority(self, request: Request, now: float) -> float:
                return 0.0

            def displaces(self, newcomer: Request, running: Request, now: float) -> bool:
                return True


@pytest.mark.parametrize("name", POLICIES)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=25)
def test_all_are_served_and_forgotten_whatever_happens(name: str, seed: int) -> None:
    rng = random.Random(seed)
    policy = make_policy(name)
    simulation = Simulation(
        policy, slots=rng.randint(1, 4), budget=64, kv_tokens=rng.choice([None, 400])
    )
    requests: list[Request] = []
    for _ in range(rng.randint(1, 60)):
        for _ in range(rng.choice([0, 0, 1, 3])):
            requests.append(random_request(rng, simulation.now))
            simulation.add(requests[-1])
        for request in simulation.waiting + simulation.running:
            if rng.random() < 0.02:
                simulation.abort(request)
        for request in simulation.running:  # the predictor changes its mind
            request.predicted_len = request.num_output_tokens + rng.uniform(1.0, 50.0)
            simulation.reprioritize(request)
        simulation.step()
    simulation.run([])
    assert all(request.is_finished for request in requests)
    assert num_books(policy) <= (2 * 3 if name == "vtc" else 0)  # vtc: heaps of three tenants


def victim_among_favourites(name: str, starvation_timeout: float) -> float:
    """When a request is done that every policy likes less than an endless stream of others."""

    def prepared(request: Request, *, token: int, cached: int) -> Request:
        request.cached_estimate = cached
        extend_keys(request.page_keys, root_key(), [token] * 8, 8)
        return request

    victim = prepared(
        make_request(100, 20, arrival=1.0, predicted=20.0, priority=5, tenant="v", ttft_target=1e6),
        token=0,
        cached=0,
    )
    favourites = [
        prepared(
            make_request(8, 3, arrival=float(n), predicted=3.0, tenant="f", ttft_target=1e5),
            token=1,
            cached=7,
        )
        for n in range(150)
    ]
    # One slot, and three steps each: the favourites come in faster than they can be served.
    simulation = Simulation(
        make_policy(name), slots=1, budget=150, starvation_timeout=starvation_timeout
    )
    simulation.run([victim, *favourites])
    return simulation.done[victim.key]


@pytest.mark.parametrize("name", POLICIES)
def test_nobody_starves(name: str) -> None:
    # batch-prefix takes no notice of the timeout: the favourites of a whole batch come first.
    latest = 250.0 if name == "batch-prefix" else 80.0
    assert victim_among_favourites(name, starvation_timeout=40.0) < latest


@pytest.mark.parametrize("name", NEED_THE_TIMEOUT)
def test_the_victim_would_starve_without_the_timeout(name: str) -> None:
    assert make_policy(name).traits.ages
    assert victim_among_favourites(name, starvation_timeout=1e9) > 400.0


def test_ageing_alone_saves_the_victim_under_priority() -> None:
    # Five levels are fifty seconds, in which fifty favourites of three steps each arrive.
    assert 150.0 < victim_among_favourites("priority", starvation_timeout=1e9) < 250.0


def mean_latency(name: str, seed: int) -> float:
    requests = bursty(150, seed=seed, slots=8, load=1.2)
    simulation = Simulation(make_policy(name), slots=8, budget=64, starvation_timeout=300.0)
    simulation.run(requests)
    return sum(simulation.done[r.key] - r.arrival_time for r in requests) / len(requests)


def test_mean_latency_is_best_with_foresight_and_better_with_hindsight_than_with_neither() -> None:
    means = {
        name: sum(mean_latency(name, seed) for seed in range(3)) / 3
        for name in ("fcfs", "mlfq", "sjf", "srtf", "ltr")
    }
    assert means["srtf"] < 0.8 * means["mlfq"] and means["mlfq"] < 0.95 * means["fcfs"]
    assert means["srtf"] < means["ltr"] < means["mlfq"]
    assert means["srtf"] < means["sjf"] < means["fcfs"]
