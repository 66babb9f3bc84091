"""BatchLLM's global prefix grouping."""

import math

from jaxserve.core.request import Request
from jaxserve.scheduling.policies.base import Policy, Priority

BATCH_SECONDS = 60.0


class _Node:
    """A page of tokens after certain other pages, which prompts of unfinished requests share."""

    __slots__ = ("number", "share", "users")

    def __init__(self, number: int, share: int) -> None:
        self.number = number
        self.share = share
        self.users = 0  # unfinished requests


class BatchPrefix(Policy):
    """Requests that share a prefix are neighbours, so its KV is computed once and gone soon.

    From "BatchLLM: Optimizing Large Batched LLM Inference with Global Prefix Sharing and
    Throughput-oriented Token Batching" (Zheng et al., 2024). All prompts form a tree of pages;
    nodes are numbered as they first appear, and a request's rank is the numbers on its path. The
    order of such tuples is depth first: the users of any node stand together, and so do the users
    of its parent. A page's key hashes all the tokens before it, so the tree is just a dict.

    Among groups (requests with the same first page) BatchLLM prefers those with more decoding per
    prompt token, for their decodes then fill up the later ones' prefill steps. The ratio is that
    of a group's first request, by powers of two: a rank that moved as the group grows would tear
    the group apart.

    For offline batches; but a group that never ends must not starve the others. So whatever comes
    later than BATCH_SECONDS after the first request of a batch begins another, and batches are
    served in turn. Every request then has a bounded number before it, and the starvation timeout,
    which would break up the groups of a long batch, is not needed.
    """

    ages = False

    def __init__(self) -> None:
        self._nodes: dict[bytes, _Node] = {}  # by page key
        self._num_nodes = 0
        self._ranks: dict[int, tuple[float, ...]] = {}  # by Request.key
        self._paths: dict[int, list[bytes]] = {}  # by Request.key
        self._batch = 0
        self._batch_began = -math.inf

    def arrived(self, request: Request, now: float) -> None:
        """Give the request its place in the tree."""
        if request.arrival_time > self._batch_began + BATCH_SECONDS:
            self._batch += 1
            self._batch_began = request.arrival_time
        path = request.page_keys[:]  # the request's own list grows with the answer
        share = _decode_share(request)
        nodes = [self._enter(key, share) for key in path]
        if not nodes:  # a prompt of less than a page is a group by itself
            nodes = [self._new_node(share)]
        numbers = (node.number for node in nodes)
        self._ranks[request.key] = (self._batch, -nodes[0].share, *numbers)
        self._paths[request.key] = path

    def priority(self, request: Request, now: float) -> Priority:
        """(batch, minus the group's decode share, node numbers from the root on)."""
        return self._ranks[request.key]

    def finished(self, request: Request) -> None:
        """Forget the request and the nodes that only it used."""
        self._ranks.pop(request.key, None)
        for key in self._paths.pop(request.key, ()):
            node = self._nodes[key]
            node.users -= 1
            if not node.users:
                del self._nodes[key]

    def _enter(self, key: bytes, share: int) -> _Node:
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = self._new_node(share)
        node.users += 1
        return node

    def _new_node(self, share: int) -> _Node:
        self._num_nodes += 1
        return _Node(self._num_nodes, share)


def _decode_share(request: Request) -> int:
    """Answer tokens per prompt token, as the exponent of a power of two, rounded down."""
    answer = max(request.predicted_len or request.max_tokens, 1.0)
    return math.floor(math.log2(answer / len(request.prompt_token_ids)))
