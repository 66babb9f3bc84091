"""Prefix grouping against what it is for: users of any common prefix stand together."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cache.page_keys import extend_keys, root_key
from jaxserve.core.request import Request
from jaxserve.scheduling.policies.batch_prefix import BATCH_SECONDS, BatchPrefix
from tests.scheduling.policies.simulation import make_request


def with_pages(pages: tuple[int, ...], *, arrival: float = 0.0, answer_len: int = 4) -> Request:
    """A request whose prompt has one-token pages of these tokens."""
    request = make_request(max(len(pages), 1), answer_len, arrival=arrival)
    extend_keys(request.page_keys, root_key(), pages, 1)
    return request


def arranged(policy: BatchPrefix, requests: list[Request]) -> list[Request]:
    for request in requests:
        policy.arrived(request, request.arrival_time)
    return sorted(requests, key=lambda r: (policy.priority(r, 0.0), r.key))


def test_a_hand_made_tree() -> None:
    a, b, c, d, e, f = (
        with_pages(pages, answer_len=4 * len(pages))
        for pages in [(1, 2, 3), (9, 9), (1, 5), (1, 2), (9,), (1, 2, 3, 4)]
    )
    # Depth first by first appearance, short before long: 1, 1-2, 1-2-3, ..., then 9.
    assert arranged(BatchPrefix(), [a, b, c, d, e, f]) == [d, a, f, c, e, b]


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), max_size=5).map(tuple), st.sampled_from([1, 4, 16, 64])
        ),
        max_size=30,
    )
)
def test_users_of_every_prefix_are_neighbours(drawn: list[tuple[tuple[int, ...], int]]) -> None:
    policy = BatchPrefix()
    pages, requests = [], []
    for path, answer_len in drawn:
        pages.append(path)
        requests.append(with_pages(path, answer_len=answer_len))
    paths = dict(zip((r.key for r in requests), pages, strict=True))
    row = [paths[r.key] for r in arranged(policy, requests)]
    for prefix in {path[:n] for path in row for n in range(1, len(path) + 1)}:
        places = [i for i, path in enumerate(row) if path[: len(prefix)] == prefix]
        assert places == list(range(places[0], places[0] + len(places)))
    # As many pages are computed as there are different ones, even if only the neighbour's KV
    # is kept: what sorting by prefix, the dumb way, achieves too.
    computed = sum(
        len(path) - len(_common(path, before))
        for before, path in zip([(), *row], row, strict=False)
    )
    assert computed == len({path[:n] for path in row for n in range(1, len(path) + 1)})


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return a[: min(len(a), len(b)) if n is None else n]


def test_groups_with_more_decoding_go_first() -> None:
    short, long, middle = (
        with_pages((n, n), answer_len=answer) for n, answer in ((1, 2), (2, 64), (3, 9))
    )
    neighbour = with_pages((1, 7), answer_len=1000)  # goes with its group, whatever it is like
    row = arranged(BatchPrefix(), [short, long, middle, neighbour])
    assert row == [long, middle, short, neighbour]


def test_a_later_batch_waits_for_the_earlier_even_in_the_same_group() -> None:
    first, other = with_pages((1, 1)), with_pages((2, 2), arrival=BATCH_SECONDS)
    late = with_pages((1, 1), arrival=BATCH_SECONDS + 1)
    later = with_pages((2, 3), arrival=2 * BATCH_SECONDS + 1)
    latest = with_pages((0, 1), arrival=2 * BATCH_SECONDS + 2, answer_len=1000)
    requests = [first, other, late, later, latest]
    assert arranged(BatchPrefix(), requests) == [first, other, late, later, latest]


def test_without_pages_it_is_arrival() -> None:
    requests = [with_pages(()) for _ in range(5)]
    assert arranged(BatchPrefix(), requests) == requests
