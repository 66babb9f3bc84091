"""What the caches were asked for and what they had."""

import dataclasses

from jaxserve.core.request import Request


@dataclasses.dataclass
class CacheCounts:
    """Tokens that starting requests looked up in the caches and found there.

    A request counts once, when it first starts: what it finds of itself after a preemption says
    nothing about how much requests have in common, and is counted apart.

    Attributes:
        queried_tokens: of requests that looked into the caches.
        device_hit_tokens: of those, whose KV was on the device (shared or copied).
        store_hit_tokens: of those, whose KV was fetched from the page store.
        restored_tokens: of preempted requests, whose KV was found, wherever, as they went on.
    """

    queried_tokens: int = 0
    device_hit_tokens: int = 0
    store_hit_tokens: int = 0
    restored_tokens: int = 0

    def started(self, request: Request, *, looked_up: bool) -> None:
        """Count a request that starts to run, with what it has found on the device.

        Args:
            request: the request.
            looked_up: whether it may take its tokens from a cache at all.
        """
        if request.num_preemptions:
            self.restored_tokens += request.num_computed_tokens
        elif looked_up:
            self.queried_tokens += request.num_tokens
            self.device_hit_tokens += request.num_computed_tokens

    def fetched(self, request: Request, num_tokens: int) -> None:
        """Count tokens that a starting request got from the page store."""
        if request.num_preemptions:
            self.restored_tokens += num_tokens
        else:
            self.store_hit_tokens += num_tokens
