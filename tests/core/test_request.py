"""The request's counters, and which of its tokens the host knows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.request import Request, RequestState
from jaxserve.core.sampling_params import SamplingParams


def make_request(prompt: list[int], output: list[int], pending: int) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=prompt,
        params=SamplingParams(),
        max_tokens=100,
        output_token_ids=output,
        num_pending_tokens=pending,
    )


@pytest.mark.parametrize(("output", "pending"), [([], 0), ([7], 0), ([], 2), ([7, 8], 1)])
def test_counts_include_pending_tokens(output: list[int], pending: int) -> None:
    request = make_request([1, 2, 3], output, pending)
    assert request.num_output_tokens == len(output) + pending
    assert request.num_tokens == 3 + len(output) + pending


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 2), st.data())
def test_known_tokens_are_a_slice_of_prompt_then_output(
    prompt_len: int, output_len: int, pending: int, data: st.DataObject
) -> None:
    tokens = list(range(prompt_len + output_len))
    request = make_request(tokens[:prompt_len], tokens[prompt_len:], pending)
    start = data.draw(st.integers(0, request.num_tokens))
    end = data.draw(st.integers(start, request.num_tokens))
    assert request.known_tokens(start, end) == tokens[start:end]


def test_requests_are_distinct_and_start_waiting() -> None:
    first, second = make_request([1], [], 0), make_request([1], [], 0)
    assert first != second and first.key < second.key
    assert first.state is RequestState.WAITING and not first.is_finished
    first.state = RequestState.FINISHED
    assert first.is_finished
