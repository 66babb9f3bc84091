"""Whether a preempted request's KV is worth moving to host memory and back.

Recomputing costs FLOPs, two per weight and token; swapping costs bytes, out and in again. vLLM
(Kwon et al., SOSP 2023) measured both and found that neither always wins. Rates start from what
the machine is said to do and follow what it is seen to do.
"""

import dataclasses

_WEIGHT = 0.1  # of a new measurement in the running mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """What the estimate starts from.

    Attributes:
        seconds_per_token: of prefill.
        page_bytes: of one KV page, all layers.
        bytes_per_second: between device and host memory.
    """

    seconds_per_token: float = 1e-4
    page_bytes: int = 2**20
    bytes_per_second: float = 8e9


class PreemptionCost:
    """Chooses between recomputation and swapping.

    Args:
        mode: `recompute`, `swap`, or `auto` for the cheaper by estimate.
        costs: what to start from.
    """

    def __init__(self, mode: str, costs: Costs) -> None:
        self._mode = mode
        self._page_bytes = costs.page_bytes
        self._seconds_per_token = costs.seconds_per_token
        self._seconds_per_byte = 1 / costs.bytes_per_second

    def swaps(self, num_tokens: int, num_pages: int) -> bool:
        """Whether so much KV is rather swapped out than recomputed.

        Args:
            num_tokens: tokens to compute again.
            num_pages: pages to move out and in again.
        """
        if self._mode != "auto":
            return self._mode == "swap"
        moved = 2 * num_pages * self._page_bytes * self._seconds_per_byte
        return moved < num_tokens * self._seconds_per_token

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """A step that was mostly prefill took so long."""
        rate = seconds / num_tokens
        self._seconds_per_token += _WEIGHT * (rate - self._seconds_per_token)

    def observe_fetch(self, num_pages: int, seconds: float) -> None:
        """Fetching so many pages took so long."""
        rate = seconds / (num_pages * self._page_bytes)
        self._seconds_per_byte += _WEIGHT * (rate - self._seconds_per_byte)
