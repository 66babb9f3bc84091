"""Deadlines and slack by hand, and what they do for service level objectives."""

from typing import Any

import pytest

from jaxserve.core.request import Request
from jaxserve.scheduling.policies import Policy, PolicySettings, make_policy
from tests.scheduling.policies.simulation import Simulation, bursty, goes_first, make_request, serve

TARGETS = PolicySettings(ttft_target=10.0, tpot_target=1.0)
SHEDS = PolicySettings(ttft_target=10.0, tpot_target=1.0, shed_overdue=True)


def arrive(policy: Policy, **kwargs: Any) -> Request:
    request = make_request(**kwargs)
    policy.arrived(request, request.arrival_time)
    return request


def learn_pace(policy: Policy, *, tokens: int, seconds: float) -> None:
    """Serve a prompt in one step of that length, then be idle for long."""
    first, second = arrive(policy, prompt_len=tokens), arrive(policy, prompt_len=1)
    serve(policy, first, tokens, 0.0)
    serve(policy, second, 1, seconds)
    for request in (first, second):
        policy.finished(request)


def test_the_earlier_deadline_goes_first() -> None:
    policy = make_policy("deadline", TARGETS)
    assert policy.priority(arrive(policy, arrival=1.0), 2.0) == (0.0, 11.0)
    assert policy.priority(arrive(policy, arrival=1.5, ttft_target=3.0), 2.0) == (0.0, 4.5)


def test_the_next_token_is_due_by_the_pace_since_the_first() -> None:
    policy = make_policy("deadline", TARGETS)
    request = arrive(policy, prompt_len=8, answer_len=9, tpot_target=0.25)
    serve(policy, request, 5, 2.0)
    assert policy.priority(request, 2.0) == (0.0, 10.0)
    serve(policy, request, 3, 3.0)
    # Measured by now: a step takes 1 s. The token was expected at 4 s, the next 0.25 s later.
    assert policy.priority(request, 3.0) == (0.0, 4.25)
    serve(policy, request, 1, 4.0)
    assert policy.priority(request, 4.0) == (0.0, 4.5)


def test_a_long_prompt_must_start_earlier_and_a_cached_one_need_not() -> None:
    policy = make_policy("deadline", TARGETS)
    learn_pace(policy, tokens=100, seconds=2.0)
    assert policy.priority(arrive(policy, prompt_len=200), 0.0) == (0.0, pytest.approx(6.0))
    cached = arrive(policy, prompt_len=200)
    cached.cached_estimate = 100
    assert policy.priority(cached, 0.0) == (0.0, pytest.approx(8.0))
    # However short, a step is a step.
    assert policy.priority(arrive(policy, prompt_len=1), 0.0) == (0.0, pytest.approx(8.0))


def test_idle_time_is_not_taken_for_a_slow_step() -> None:
    policy = make_policy("deadline", TARGETS)
    learn_pace(policy, tokens=100, seconds=2.0)
    for hour in (1, 2):  # each is all there is to do, and the next comes an hour later
        alone = arrive(policy, prompt_len=100)
        serve(policy, alone, 100, 3600.0 * hour)
        policy.finished(alone)
    assert policy.priority(arrive(policy, prompt_len=200), 0.0) == (0.0, pytest.approx(6.0))


def test_whoever_cannot_make_it_comes_after_all_that_can() -> None:
    policy = make_policy("deadline", TARGETS)
    late, in_time = arrive(policy, arrival=0.0), arrive(policy, arrival=9.0)
    assert goes_first(policy, late, in_time, 10.0)
    assert goes_first(policy, in_time, late, 10.1)
    serve(policy, late, 8, 11.0)  # its token came too late: nothing can be saved any more
    assert policy.priority(late, 11.0) == (1.0, 12.0)


def test_displaces_who_can_wait_for_whom_is_in_danger() -> None:
    policy = make_policy("deadline", TARGETS)
    running = arrive(policy, prompt_len=8, answer_len=50)
    serve(policy, running, 8, 0.0)
    newcomer = arrive(policy, arrival=0.0)
    assert not policy.displaces(newcomer, running, 6.0)  # due at 1, so not far ahead
    for _ in range(19):
        serve(policy, running, 1, 0.0)
    assert not policy.displaces(newcomer, running, 4.9)  # the newcomer is not in danger yet
    assert policy.displaces(newcomer, running, 5.0)
    assert policy.displaces(newcomer, running, 9.9)  # the other is due at 20
    assert not policy.displaces(newcomer, running, 10.0)
    assert not policy.displaces(newcomer, running, 10.1)  # too late anyway
    lost = arrive(policy, arrival=-10.0)
    assert policy.displaces(newcomer, lost, 6.0)
    assert not policy.displaces(newcomer, arrive(policy, arrival=1.0), 6.0)


def test_sheds_only_when_told_to_and_never_who_has_a_token() -> None:
    assert not make_policy("deadline", TARGETS).traits.sheds
    policy = make_policy("deadline", SHEDS)
    assert policy.traits.sheds
    waiting, started = arrive(policy), arrive(policy)
    serve(policy, started, 8, 1.0)
    assert not policy.sheds(waiting, 10.0) and not policy.sheds(started, 100.0)
    assert policy.sheds(waiting, 10.1)


def test_sheds_what_is_sure_to_be_late() -> None:
    policy = make_policy("deadline", SHEDS)
    learn_pace(policy, tokens=100, seconds=2.0)
    request = arrive(policy, prompt_len=300)  # takes 6 s
    assert not policy.sheds(request, 3.9)
    assert policy.sheds(request, 4.1)


def attainment(name: str, seed: int, settings: PolicySettings) -> float:
    """The part of a bursty load's requests that meet both targets."""
    requests = bursty(150, seed=seed, slots=8, load=0.9)
    simulation = Simulation(make_policy(name, settings), slots=8, budget=64)
    simulation.run(requests)
    good = 0
    for request in requests:
        if request not in simulation.shed:
            first, done = simulation.first_token[request.key], simulation.done[request.key]
            decode_target = settings.tpot_target * (request.max_tokens - 1)
            good += first - request.arrival_time <= settings.ttft_target and (
                done - first <= decode_target
            )
    return good / len(requests)


def test_more_requests_meet_their_targets_than_by_arrival_and_shedding_helps_more() -> None:
    targets = PolicySettings(ttft_target=10.0, tpot_target=2.0)
    sheds = PolicySettings(ttft_target=10.0, tpot_target=2.0, shed_overdue=True)
    fcfs, deadline, shedding = (
        sum(attainment(name, seed, settings) for seed in range(3)) / 3
        for name, settings in (("fcfs", targets), ("deadline", targets), ("deadline", sheds))
    )
    assert fcfs + 0.2 < deadline < shedding
