"""Deadlines by hand, without a policy."""

from typing import Any

from jaxserve.core.request import Request
from jaxserve.scheduling.deadlines import Deadlines
from tests.scheduling.policies.simulation import compute, make_request


def opened(deadlines: Deadlines, **service: Any) -> Request:
    request = make_request(answer_len=9, **service)
    deadlines.open(request)
    return request


def test_a_request_s_own_targets_come_before_the_options() -> None:
    deadlines = Deadlines(10.0, 1.0)
    plain, hasty = opened(deadlines), opened(deadlines, ttft_target=3.0, tpot_target=0.25)
    assert [deadlines.ttft_target(request) for request in (plain, hasty)] == [10.0, 3.0]
    assert deadlines.ranks([plain, hasty], 5.0) == [(0.0, 10.0), (1.0, 3.0)]
    for request in (plain, hasty):
        compute(request, 8, lambda served: deadlines.note(served, 5.0))
    # The second's first token came 2 s too late, and that is not forgotten.
    assert deadlines.ranks([plain, hasty], 5.0) == [(0.0, 6.0), (1.0, 5.25)]
    assert deadlines.has_started(plain) and not deadlines.has_started(opened(deadlines))


def test_an_ended_request_is_forgotten_even_twice() -> None:
    deadlines = Deadlines(10.0, 1.0)
    request = opened(deadlines)
    deadlines.close(request)
    deadlines.close(request)
    assert not deadlines._books
