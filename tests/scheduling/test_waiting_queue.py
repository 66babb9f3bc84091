"""The waiting queue against a sorted list."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.request import Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.scheduling.waiting_queue import Ranked, WaitingQueue


def make_entry(key: int, priority: float) -> Ranked:
    request = Request(
        request_id=str(key), prompt_token_ids=[1], params=SamplingParams(), max_tokens=1, key=key
    )
    return Ranked(priority, key, request)


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "discard"]), st.integers(0, 9))))
def test_order_is_that_of_a_sorted_list(operations: list[tuple[str, int]]) -> None:
    queue, oracle = WaitingQueue(), []
    for key, (what, number) in enumerate(operations):
        if what == "push":
            entry = make_entry(key, number)
            queue.push(entry)
            oracle.append(entry)
        elif oracle and what == "pop":
            oracle.sort()
            assert queue.pop() is oracle.pop(0)
        elif oracle:
            entry = oracle.pop(number % len(oracle))
            queue.discard(entry.request)
            assert entry.request not in queue
        assert len(queue) == len(oracle)
        assert queue.peek() == min(oracle, default=None)


def test_abandoned_requests_do_not_pile_up_behind_a_blocked_head() -> None:
    queue = WaitingQueue()
    queue.push(make_entry(0, 0.0))
    for key in range(1, 1000):
        entry = make_entry(key, key)
        queue.push(entry)
        queue.discard(entry.request)
    assert len(queue) == 1
    assert len(queue._heap) < 100
