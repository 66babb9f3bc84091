"""Skip-join and demotion, by hand and against a request that is told every level."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.scheduling.policies import make_policy
from jaxserve.scheduling.policies.mlfq import QUANTA, MultiLevelFeedbackQueue
from tests.scheduling.policies.simulation import goes_first, make_request, serve


@pytest.mark.parametrize(
    "prompt_len, level",
    # Quanta are 8, 16, 32, ... answer tokens; 32 prompt tokens cost as much as one.
    [(1, 0), (255, 0), (256, 1), (511, 1), (512, 2), (2000, 3), (16383, 6), (16384, 7), (10**6, 7)],
)
def test_long_prompts_skip_levels_that_could_not_pay_for_them(prompt_len: int, level: int) -> None:
    policy = make_policy("mlfq")
    request = make_request(prompt_len, arrival=3.0)
    policy.arrived(request, 5.0)
    assert policy.priority(request, 5.0) == (level, 3.0)


def test_whoever_used_up_a_quantum_goes_to_the_end_of_the_next_level() -> None:
    policy = make_policy("mlfq")
    request = make_request(64, 10_000)  # the prompt takes 2 of the first quantum's 8
    policy.arrived(request, 0.0)
    serve(policy, request, 64, 0.0)
    seen = {}
    for answer in range(2, 1500):
        serve(policy, request, 1, float(answer))
        seen[answer] = policy.priority(request, 1e9)
    assert seen[5] == (0, 0.0)
    assert seen[6] == seen[21] == (1, 6.0)
    assert seen[22] == (2, 22.0)
    assert seen[53] == (2, 22.0) and seen[54] == (3, 54.0)
    assert seen[1013] == (6, 502.0) and seen[1014] == seen[1499] == (7, 1014.0)


def test_displaces_worse_levels_only() -> None:
    policy = make_policy("mlfq")
    first, second, long = make_request(8), make_request(8, arrival=1.0), make_request(600)
    for request in (first, second, long):
        policy.arrived(request, 1.0)
    assert policy.displaces(second, long, 1.0)
    assert not policy.displaces(long, second, 1.0)
    assert not policy.displaces(first, second, 1.0)
    assert goes_first(policy, first, second)


def test_computing_again_after_a_preemption_is_not_charged() -> None:
    policy = make_policy("mlfq")
    request = make_request(64, 100)
    policy.arrived(request, 0.0)
    serve(policy, request, 64)
    for _ in range(10):
        request.num_computed_tokens = 0
        serve(policy, request, 30)
        assert policy.priority(request, 0.0) == (0, 0.0)
    serve(policy, request, request.num_tokens - 30)
    assert request.num_output_tokens == 2
    assert policy.priority(request, 0.0) == (0, 0.0)


@given(st.integers(1, 20_000), st.integers(1, 1200))
def test_level_is_the_one_whose_quanta_cover_the_service(prompt_len: int, answer_len: int) -> None:
    policy = MultiLevelFeedbackQueue()
    request = make_request(prompt_len, answer_len)
    policy.arrived(request, 0.0)
    serve(policy, request, prompt_len)
    for _ in range(answer_len - 1):
        serve(policy, request, 1)
    # The oracle: walk down the levels from the one joined, paying each level's quantum.
    last = len(QUANTA) - 1
    joined = next(i for i in range(last + 1) if i == last or prompt_len < 256 * 2**i)
    service, level = prompt_len + 32 * answer_len, joined
    while level < last and service >= 256 * 2**level:
        service -= 256 * 2**level
        level += 1
    rank = policy.priority(request, 0.0)
    assert isinstance(rank, tuple) and rank[0] == level
