"""BatchLLM's global prefix grouping."""

import math

from jaxserve.core.request import Request
from jaxserve.scheduling.policies.base import Policy, Priority, Traits
from jaxserve.scheduling.prefix_tree import PrefixTree

BATCH_SECONDS = 60.0


class BatchPrefix(Policy):
    """Requests that share a prefix are neighbours, so its KV is computed once and gone soon.

    From "BatchLLM: Optimizing Large Batched LLM Inference with Global Prefix Sharing and
    Throughput-oriented Token Batching" (Zheng et al., 2024). A request's rank is its path in the
    tree of all prompts. Among groups (requests with the same first page) BatchLLM prefers those
    with more decoding per prompt token, for their decodes then fill up the later ones' prefill
    steps. The ratio is that of a group's first request, by powers of two: a rank that moved as
    the group grows would tear the group apart.

    For offline batches; but a group that never ends must not starve the others. So what comes
    later than BATCH_SECONDS after the first request of a batch begins another, and batches are
    served in turn. Every request then has a bounded number before it, and the starvation timeout,
    which would break up the groups of a long batch, is not needed.
    """

    traits = Traits(ages=False)

    def __init__(self) -> None:
        self._tree = PrefixTree()
        self._ranks: dict[int, tuple[float, ...]] = {}  # by Request.key
        self._batch = 0
        self._batch_began = -math.inf

    def arrived(self, request: Request, now: float) -> None:
        """Give the request its place in the tree."""
        if request.arrival_time > self._batch_began + BATCH_SECONDS:
            self._batch += 1
            self._batch_began = request.arrival_time
        answer = max(request.predicted_len or request.max_tokens, 1.0)
        share = math.floor(math.log2(answer / len(request.prompt_token_ids)))
        group_share, path = self._tree.enter(request, share)
        self._ranks[request.key] = (self._batch, -group_share, *path)

    def priority(self, request: Request, now: float) -> Priority:
        """(batch, minus the group's decode share, node numbers from the root on)."""
        return self._ranks[request.key]

    def finished(self, request: Request) -> None:
        """Forget the request."""
        self._ranks.pop(request.key, None)
        self._tree.leave(request)
