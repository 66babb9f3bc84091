"""The order that each simple policy gives, worked out by hand."""

import math

import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.core.request import Request
from jaxserve.scheduling.policies import Policy, make_policy
from tests.scheduling.policies.simulation import goes_first, make_request, serve


def ordered(policy: Policy, requests: list[Request], now: float = 0.0) -> list[int]:
    """Positions of the requests in policy order."""
    for request in requests:
        policy.arrived(request, now)
    ranks = [(policy.priority(r, now), r.key) for r in requests]
    return [ranks.index(rank) for rank in sorted(ranks)]


def test_unknown_policies_are_refused_with_a_list_of_those_there_are() -> None:
    with pytest.raises(ConfigError, match="batch-prefix, deadline, fcfs"):
        make_policy("lifo")


def test_priority_goes_by_level_and_ten_seconds_of_waiting_are_worth_one() -> None:
    requests = [
        make_request(priority=1, arrival=0.0),  # 1.0
        make_request(priority=0, arrival=9.0),  # 0.9: nine seconds late, but a level better
        make_request(priority=0, arrival=11.0),  # 1.1
        make_request(priority=-1, arrival=12.0),  # 0.2
        make_request(priority=1, arrival=0.0),  # 1.0, younger
    ]
    assert ordered(make_policy("priority"), requests, now=12.0) == [3, 1, 0, 4, 2]


def test_priority_displaces_only_lower_levels() -> None:
    policy = make_policy("priority")
    urgent, plain = make_request(priority=-3), make_request()
    assert policy.displaces(urgent, plain, 0.0)
    assert not policy.displaces(plain, urgent, 0.0)
    old = make_request(arrival=-1000.0)  # goes first in the queue, yet takes nobody's place
    assert goes_first(policy, old, urgent)
    assert not policy.displaces(old, urgent, 0.0) and not policy.displaces(old, plain, 0.0)


@pytest.mark.parametrize("name", ["sjf", "srtf", "ltr"])
def test_shorter_predictions_go_first_and_none_at_all_last(name: str) -> None:
    requests = [make_request(predicted=n) for n in (30.0, None, 10.0, 20.0, 10.0, -1.0)]
    policy = make_policy(name)
    assert policy.traits.wants_predictions
    assert ordered(policy, requests) == [5, 2, 4, 3, 0, 1]


def test_sjf_displaces_nobody() -> None:
    assert not make_policy("sjf").displaces(
        make_request(predicted=1.0), make_request(predicted=1000.0), 0.0
    )


def test_ltr_displaces_by_rank_alone_however_far_the_other_has_come() -> None:
    policy = make_policy("ltr")
    running, equal, shorter = (make_request(8, 100, predicted=n) for n in (50.0, 50.0, 49.0))
    for request in (running, equal, shorter):
        policy.arrived(request, 0.0)
    serve(policy, running, 8)
    for _ in range(45):
        serve(policy, running, 1)
    assert policy.displaces(shorter, running, 0.0)
    assert not policy.displaces(equal, running, 0.0)
    assert not policy.displaces(make_request(predicted=None), running, 0.0)


def srtf_after(answer: int, predicted: float | None = 100.0) -> Request:
    request = make_request(8, 1000, predicted=predicted)
    request.output_token_ids = [1] * (answer - 1)
    request.num_pending_tokens = 1  # counts too
    request.num_tokens += answer
    return request


def test_srtf_goes_by_what_remains() -> None:
    requests = [srtf_after(10), srtf_after(60), make_request(predicted=50.0)]  # 90, 40, 50
    assert ordered(make_policy("srtf"), requests) == [1, 2, 0]


def test_srtf_displaces_only_by_a_clear_margin() -> None:
    policy, running = make_policy("srtf"), srtf_after(50)  # 50 remain: 0.8 * 50 = 40
    assert policy.displaces(make_request(predicted=39.0), running, 0.0)
    assert not policy.displaces(make_request(predicted=40.0), running, 0.0)
    assert not policy.displaces(make_request(predicted=None), running, 0.0)
    assert policy.displaces(make_request(predicted=1e6), srtf_after(50, None), 0.0)


def test_srtf_leaves_alone_what_is_nearly_done_and_ranks_it_before_the_rest() -> None:
    policy = make_policy("srtf")
    short = make_request(predicted=1.0)
    assert policy.displaces(short, srtf_after(79), 0.0)
    assert not policy.displaces(short, srtf_after(80), 0.0)
    nearly, young = srtf_after(800, 1000.0), srtf_after(1, 20.0)  # 200 and 19 remain
    assert ordered(policy, [young, short, nearly]) == [2, 1, 0]
    # A new prediction says that it was not nearly done after all.
    nearly.predicted_len = 5000.0
    assert ordered(policy, [young, short, nearly]) == [1, 0, 2]
    assert policy.displaces(short, nearly, 0.0)


def test_srtf_counts_an_outlived_prediction_as_about_to_end() -> None:
    assert make_policy("srtf").priority(srtf_after(150), 0.0) == (0.0, 1.0)
    assert make_policy("srtf").priority(srtf_after(150, None), 0.0) == (1.0, math.inf)


def test_lpm_prefers_what_is_cached_now() -> None:
    policy, requests = make_policy("lpm"), [make_request(100) for _ in range(4)]
    for request, cached in zip(requests, (0, 64, 32, 64), strict=True):
        request.cached_estimate = cached
    assert policy.traits.refreshes
    assert ordered(policy, requests) == [1, 3, 2, 0]
    requests[0].cached_estimate = 96  # somebody computed it meanwhile
    requests[1].cached_estimate = 0  # and this was evicted
    assert ordered(policy, requests) == [0, 3, 2, 1]
