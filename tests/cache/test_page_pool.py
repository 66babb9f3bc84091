"""The page pool against a dumb model of it, and its refusals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cache import PagePool


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=60))
def test_pages_are_never_lost_or_shared(operations: list[tuple[bool, int]]) -> None:
    pool = PagePool(11)
    held: list[list[int]] = []
    for allocates, n in operations:
        if allocates:
            free_before = pool.num_free
            pages = pool.allocate(n)
            if pages is None:
                assert n > free_before == pool.num_free
            else:
                assert len(pages) == n <= free_before
                held.append(pages)
        elif held:
            pool.free(held.pop(n % len(held)))
        pool.check()
        owned = [page for pages in held for page in pages]
        assert len(set(owned)) == len(owned) == pool.num_used
        assert set(owned) <= set(range(11))
        assert pool.num_free == pool.num_available == 11 - len(owned)
        assert (pool.num_cached, pool.num_total) == (0, 11)


def test_last_freed_is_first_allocated() -> None:
    pool = PagePool(5)
    assert pool.allocate(3) == [0, 1, 2]
    pool.free([1])
    assert pool.allocate(1) == [1]
    assert pool.allocate(2) == [3, 4]
    assert pool.allocate(1) is None


@pytest.mark.parametrize("pages", [[0], [5], [-1], [4, 4]])
def test_freeing_what_is_not_in_use_fails(pages: list[int]) -> None:
    pool = PagePool(5)
    taken = pool.allocate(5)
    assert taken is not None
    pool.free([0])
    with pytest.raises(ValueError, match="not in use"):
        pool.free(pages)


def test_impossible_sizes_fail() -> None:
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(0)
    with pytest.raises(ValueError, match="cannot allocate"):
        PagePool(1).allocate(-1)


def test_check_finds_a_broken_free_list() -> None:
    pool = PagePool(4)
    pool.allocate(2)
    pool._free.append(0)  # as a double free would leave it
    with pytest.raises(AssertionError):
        pool.check()
