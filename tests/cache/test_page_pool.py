"""The page pool: what it hands out and takes back, what it refuses, and what it keeps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cache import PagePool
from jaxserve.cache.page_keys import page_key, root_key


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


ROOT = root_key()


def fill(pool: PagePool, *pages_of_tokens: list[int], parent: bytes = ROOT) -> list[int]:
    """Allocate and publish a chain of pages."""
    pages = pool.allocate(len(pages_of_tokens)) or []
    for i, tokens in enumerate(pages_of_tokens):
        key = page_key(parent, tokens)
        pages[i] = pool.publish(pages[i], key, parent, tokens)
        parent = key
    return pages


def keys(*pages_of_tokens: list[int]) -> list[bytes]:
    chain = [ROOT]
    for tokens in pages_of_tokens:
        chain.append(page_key(chain[-1], tokens))
    return chain[1:]


def test_a_chain_is_evicted_from_its_end_and_after_all_free_pages() -> None:
    pool = PagePool(5)
    old = fill(pool, [1], [2])
    new = fill(pool, [3], [4])
    pool.free(old)
    pool.free(new)
    assert (pool.num_free, pool.num_cached) == (1, 4)
    assert pool.match(keys([1], [2], [9])) == old
    pool.begin_step()  # from now on what they hold is worth saving
    assert pool.allocate(4) == [4, old[1], old[0], new[1]]
    assert pool.take_evicted() == [
        (old[1], keys([1], [2])[1]),
        (old[0], keys([1])[0]),
        (new[1], keys([3], [4])[1]),
    ]
    assert pool.match(keys([3], [4])) == new[:1]


def test_a_page_that_was_used_again_is_evicted_later() -> None:
    pool = PagePool(2)
    first, second = fill(pool, [1]), fill(pool, [2])
    pool.free(first)
    pool.free(second)
    pool.share(first)
    pool.free(first)
    assert pool.allocate(1) == second


def test_equal_pages_are_held_once() -> None:
    pool = PagePool(3)
    first = fill(pool, [1], [2])
    again = pool.allocate(1)
    assert again == [2]
    assert pool.publish(2, keys([1])[0], ROOT, [1]) == first[0]
    assert (pool.num_used, pool.num_free) == (2, 1)
    pool.free(first)
    assert pool.num_used == 1  # the second request's reference to the first page
    pool.free(first[:1])
    assert pool.num_cached == 2


def test_a_duplicate_is_not_handed_out_in_the_step_that_may_still_write_it() -> None:
    pool = PagePool(2)
    fill(pool, [1])
    fill(pool, [1])
    assert (pool.num_free, pool.num_available) == (1, 0)
    assert pool.allocate(1) is None
    pool.begin_step()
    assert pool.allocate(1) == [1]


def test_a_page_is_not_copied_in_the_step_that_writes_it() -> None:
    pool = PagePool(2)
    (page,) = fill(pool, [1, 2])
    assert pool.match(keys([1, 2])) == [page]  # shared it may be: all rows write before any reads
    assert pool.match_partial(ROOT, [1, 9]) is None
    pool.begin_step()
    assert pool.match_partial(ROOT, [1, 9]) == (page, 1)


def test_a_page_that_was_never_written_is_not_saved() -> None:
    pool = PagePool(1)
    pool.free(fill(pool, [1]))
    assert pool.allocate(1) == [0]
    assert pool.take_evicted() == []


def test_of_a_page_evicted_twice_in_a_step_only_what_it_still_holds_is_saved() -> None:
    pool = PagePool(1)
    pool.free(fill(pool, [1]))
    pool.begin_step()
    assert pool.allocate(1) == [0]
    pool.publish_tail(0, ROOT, [2])
    pool.free([0])
    assert pool.allocate(1) == [0]
    assert pool.take_evicted() == [(0, keys([1])[0])]


def test_tails_are_copied_and_never_shared() -> None:
    pool = PagePool(3)
    (tail,) = pool.allocate(1) or []
    pool.publish_tail(tail, ROOT, [1, 2])
    pool.free([tail])
    assert pool.num_cached == 1
    assert pool.match(keys([1, 2])) == []
    assert pool.match_partial(ROOT, [1, 2, 3]) == (tail, 2)
    assert pool.match_partial(ROOT, [1, 5]) == (tail, 1)
    assert pool.match_partial(ROOT, [2]) is None
    assert pool.match_partial(keys([1])[0], [1, 2]) is None
    assert pool.cached_pages() == [] and pool.num_cached == 1


def test_a_second_tail_of_the_same_tokens_only_renews_the_first() -> None:
    pool = PagePool(3)
    tails = pool.allocate(2) or []
    pool.publish_tail(tails[0], ROOT, [1])
    pool.free(tails[:1])
    pool.free(fill(pool, [2]))
    pool.publish_tail(tails[1], ROOT, [1])
    pool.free(tails[1:])
    assert (pool.num_cached, pool.num_free) == (2, 1)
    pool.begin_step()
    pool.allocate(2)
    assert pool.match_partial(ROOT, [1]) == (tails[0], 1)
    assert pool.match(keys([2])) == []


def test_a_tail_that_turns_out_to_be_full_is_shared() -> None:
    pool = PagePool(2)
    (tail,) = pool.allocate(1) or []
    pool.publish_tail(tail, ROOT, [1, 2])
    assert fill(pool, [1, 2]) == [tail]
    assert pool.match(keys([1, 2])) == [tail]


def test_the_best_of_the_latest_few_is_copied() -> None:
    pool = PagePool(10)
    fill(pool, [1, 2, 3, 4, 5])
    for number in range(7):
        fill(pool, [1, 2, 3, 100 + number])
    pool.begin_step()
    assert pool.match_partial(ROOT, [1, 2, 3, 4]) == (0, 4)
    assert pool.match_partial(ROOT, [1, 2, 9]) == (7, 2)  # of equals the latest
    fill(pool, [1, 9])
    pool.begin_step()
    assert pool.match_partial(ROOT, [1, 2, 3, 4]) == (7, 3)  # page 0 is the ninth now


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    pool = PagePool(3, prefix_cache=False)
    assert fill(pool, [1]) == [0]
    assert fill(pool, [1]) == [1]
    pool.publish_tail(1, ROOT, [1])
    pool.begin_step()
    assert pool.match(keys([1])) == [] and pool.match_partial(ROOT, [1]) is None
    pool.free([0, 1])
    assert (pool.num_free, pool.num_cached) == (3, 0)


def test_clear_forgets_what_is_cached_and_what_is_used() -> None:
    pool = PagePool(4)
    pool.free(fill(pool, [1], [2]))
    used = fill(pool, [3])
    pool.clear()
    pool.check()
    assert (pool.num_free, pool.num_cached, pool.num_used) == (3, 0, 1)
    assert pool.match(keys([1])) == pool.match(keys([3])) == pool.cached_pages() == []
    pool.free(used)
    assert pool.num_free == 4


def test_clear_forgets_what_was_about_to_be_saved() -> None:
    pool = PagePool(2)
    pool.free(fill(pool, [1]))
    pool.begin_step()
    (fresh,) = fill(pool, [2], [3])[:1]
    pool.clear()
    assert pool.take_evicted() == []
    pool.begin_step()
    pool.publish(fresh, keys([4])[0], ROOT, [4])
    pool.free([fresh])
    pool.begin_step()
    assert pool.allocate(1) == [fresh]
    assert pool.take_evicted() == [(fresh, keys([4])[0])]


def test_only_private_pages_are_published() -> None:
    pool = PagePool(3)
    (page,) = fill(pool, [1])
    (shared,) = pool.allocate(1) or []
    pool.share([shared])
    for publish in (
        lambda page: pool.publish(page, keys([7])[0], ROOT, [7]),
        lambda page: pool.publish_tail(page, ROOT, [7]),
    ):
        with pytest.raises(ValueError, match="published already"):
            publish(page)
        for wrong in (shared, 2, 3, -1):
            with pytest.raises(ValueError, match="exactly one reference"):
                publish(wrong)
    pool.free([shared])
    with pytest.raises(ValueError, match="without tokens"):
        pool.publish(shared, keys([])[0], ROOT, [])
    pool.check()


@pytest.mark.parametrize(("page", "reason"), [(1, "is free"), (2, "not of this pool"), (-1, "not")])
def test_only_pages_that_hold_something_are_shared(page: int, reason: str) -> None:
    pool = PagePool(2)
    pool.allocate(1)
    with pytest.raises(ValueError, match=reason):
        pool.share([page])


def test_check_finds_a_broken_free_list() -> None:
    pool = PagePool(4)
    pool.allocate(2)
    pool._free.append(0)  # as a double free would leave it
    with pytest.raises(AssertionError):
        pool.check()
