"""Longest prefix match."""

from jaxserve.core.request import Request
from jaxserve.scheduling.policies.base import Policy, Priority, Traits


class LongestPrefixMatch(Policy):
    """The request that finds most of its prompt in the cache goes first, while it still is there.

    The cache-aware order of SGLang (Zheng et al., NeurIPS 2024): on a prefix tree it visits
    requests nearly depth first, and so reuses each cached prefix before it is evicted. What is
    cached changes while requests wait, so their ranks are looked at again and again.
    """

    traits = Traits(refreshes=True)

    def priority(self, request: Request, now: float) -> Priority:
        """Minus the prompt tokens that are in the cache."""
        return -request.cached_estimate
