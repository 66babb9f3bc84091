"""The tree of prefixes that prompts of unfinished requests share."""

from collections.abc import Sequence

from jaxserve.core.request import Request


class _Node:
    """A page of tokens after certain other pages."""

    __slots__ = ("number", "share", "users")

    def __init__(self, number: int, share: int) -> None:
        self.number = number
        self.share = share
        self.users = 0  # unfinished requests


class PrefixTree:
    """Gives every prompt a path of numbered nodes, one per page.

    Nodes are numbered as they first appear, so the order of paths is depth first: the users of
    any node stand together, and so do the users of its parent. A page's key hashes all the tokens
    before it, so the tree is just a dict. A node is there as long as a request uses it.
    """

    def __init__(self) -> None:
        self._nodes: dict[bytes, _Node] = {}  # by page key
        self._num_nodes = 0
        self._paths: dict[int, list[bytes]] = {}  # by Request.key

    def enter(self, request: Request, share: int) -> tuple[int, Sequence[int]]:
        """Give the request its place.

        Args:
            request: its `page_keys` are those of its prompt.
            share: kept at the nodes that are new.

        Returns:
            The share at its first node, and its nodes' numbers from the root on.
        """
        path = request.page_keys[:]  # the request's own list grows with the answer
        nodes = [self._use(key, share) for key in path]
        if not nodes:  # a prompt of less than a page is a group by itself
            nodes = [self._new_node(share)]
        self._paths[request.key] = path
        return nodes[0].share, [node.number for node in nodes]

    def leave(self, request: Request) -> None:
        """Forget the request and the nodes that only it used."""
        for key in self._paths.pop(request.key, ()):
            node = self._nodes[key]
            node.users -= 1
            if not node.users:
                del self._nodes[key]

    def _use(self, key: bytes, share: int) -> _Node:
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = self._new_node(share)
        node.users += 1
        return node

    def _new_node(self, share: int) -> _Node:
        self._num_nodes += 1
        return _Node(self._num_nodes, share)
