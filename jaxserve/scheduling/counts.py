"""What the caches were asked for and what they had."""

import dataclasses


@dataclasses.dataclass
class CacheCounts:
    """Tokens, counted each time a request starts to run.

    Attributes:
        queried_tokens: of those requests.
        device_hit_tokens: whose KV was on the device (shared or copied).
        store_hit_tokens: whose KV was loaded from the page store.
    """

    queried_tokens: int = 0
    device_hit_tokens: int = 0
    store_hit_tokens: int = 0
