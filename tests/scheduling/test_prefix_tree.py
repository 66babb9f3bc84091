"""The tree of shared prefixes: who stands where, and what is kept."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.scheduling.prefix_tree import PrefixTree
from tests.scheduling.policies.test_batch_prefix import with_pages


def test_paths_are_numbered_by_first_appearance_and_take_the_share_of_their_first_node() -> None:
    tree = PrefixTree()
    paths = [(1, 2, 3), (9, 9), (1, 5), (), (1, 2)]
    entered = [tree.enter(with_pages(path), share) for share, path in enumerate(paths)]
    assert entered == [(0, [1, 2, 3]), (1, [4, 5]), (0, [1, 6]), (3, [7]), (0, [1, 2])]


@given(st.lists(st.lists(st.integers(0, 2), max_size=4).map(tuple), max_size=20), st.randoms())
def test_nodes_are_kept_as_long_as_a_request_uses_them(paths: list[tuple[int, ...]], rng) -> None:
    tree, requests = PrefixTree(), [with_pages(path) for path in paths]
    for request in requests:
        tree.enter(request, 0)
        request.page_keys.append(b"a page of the answer")
    rng.shuffle(requests)
    while requests:
        assert tree._nodes.keys() == {key for r in requests for key in r.page_keys[:-1]}
        tree.leave(requests.pop())
    assert not tree._nodes and not tree._paths
