import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cache.page_keys import page_key
from jaxserve.cache.page_map import make_page_map
from jaxserve.cache.page_pool import PagePool

STATES = st.lists(st.sampled_from(["free", "cached", "used"]), min_size=1, max_size=200)


@given(STATES, st.integers(1, 250))
def test_bins_count_pages_by_state(states: list[str], max_bins: int):
    references = [2 if state == "used" else 0 for state in states]
    cached = [page for page, state in enumerate(states) if state == "cached"]
    result = make_page_map(references, cached, max_bins)
    assert len(result.used) == len(result.cached) <= max_bins
    assert result.num_pages == len(states)
    for i, (used, kept) in enumerate(zip(result.used, result.cached, strict=True)):
        part = states[i * result.bin_pages :][: result.bin_pages]
        assert part, "a bin without pages"
        assert (used, kept) == (part.count("used"), part.count("cached"))
    assert len(result.used) * result.bin_pages >= len(states)


def test_a_pool_as_it_fills():
    pool = PagePool(6)
    pages = pool.allocate(3)
    assert pages == [0, 1, 2]
    assert pool.page_map(6) == (6, 1, [1, 1, 1, 0, 0, 0], [0] * 6)
    pool.publish(0, page_key(b"", [1, 2]), b"", [1, 2])
    pool.free([0, 1])
    assert pool.page_map(6) == (6, 1, [0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0])
    assert pool.page_map(2) == (6, 3, [1, 0], [1, 0])


def test_a_page_read_in_two_states_is_counted_once():
    assert make_page_map([1, 0], [0], 1).used == [1]
    assert make_page_map([1, 1], [0, 1], 1) == (2, 2, [2], [0])


def test_read_while_another_thread_changes_the_pool():
    pool, end = PagePool(3000), threading.Event()

    def churn() -> None:
        number = 0
        while not end.is_set():
            pool.begin_step()
            pages = pool.allocate(500) or []
            for page in pages[::2]:
                number += 1
                pool.publish(page, page_key(b"", [number]), b"", [number])
            pool.free(pages)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(300):
            result = pool.page_map(100)
            pairs = zip(result.used, result.cached, strict=True)
            assert all(used + cached <= 30 for used, cached in pairs)
    finally:
        end.set()
        thread.join()
    pool.check()
    assert sum(pool.page_map(7).cached) == pool.num_cached


def test_no_bins():
    with pytest.raises(ValueError, match="at least one bin"):
        make_page_map([0], [], 0)
