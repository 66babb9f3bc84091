"""FastServe's skip-join multi-level feedback queue."""

import math
from collections.abc import Sequence

from jaxserve.core.request import Request
from jaxserve.scheduling.policies.base import Policy, Priority

NUM_LEVELS = 8
FIRST_QUANTUM = 8.0  # answer tokens
# A decode's step costs about as much as so many prompt tokens, since it reads all weights too.
PROMPT_TOKENS_PER_ANSWER_TOKEN = 32.0

_QUANTA = (*(FIRST_QUANTUM * 2**level for level in range(NUM_LEVELS - 1)), math.inf)


class MultiLevelFeedbackQueue(Policy):
    """Shortest first without predictions: whoever has had much service yields to who had little.

    From "Fast Distributed Inference Serving for Large Language Models" (FastServe, Wu et al.,
    2023). Requests of a level are served in the order in which they joined it. Each level grants
    a quantum, twice that of the level above; one who used it up is demoted, and yields its place
    to any newcomer of a better level. What a prompt costs is known beforehand, so a request skips
    the levels whose quantum could not even pay for that (skip-join) instead of being demoted
    through them. The last level has no end.

    Quanta are in answer tokens, where the paper has seconds: they then depend neither on the
    machine nor on who shares a step. What a preempted request computes again is not charged.
    FastServe promotes whoever has waited too long; here the starvation timeout does.
    """

    reranks = True

    def __init__(self) -> None:
        self._ranks: dict[int, tuple[float, float]] = {}  # (level, when it joined the level)
        self._quantum_ends: dict[int, float] = {}  # `Request.num_tokens` at which it is demoted

    def arrived(self, request: Request, now: float) -> None:
        """Join the first level whose quantum pays for the prompt."""
        prompt_len = len(request.prompt_token_ids)
        cost = prompt_len / PROMPT_TOKENS_PER_ANSWER_TOKEN
        level = next(i for i, quantum in enumerate(_QUANTA) if cost < quantum)
        self._ranks[request.key] = (float(level), request.arrival_time)
        self._quantum_ends[request.key] = prompt_len + _QUANTA[level] - cost

    def priority(self, request: Request, now: float) -> Priority:
        """(level from 0 on, when the request joined it in seconds)."""
        return self._ranks[request.key]

    def priorities(self, requests: Sequence[Request], now: float) -> Sequence[Priority]:
        """See `Policy.priorities`."""
        ranks = self._ranks
        return [ranks[request.key] for request in requests]

    def displaces(self, newcomer: Request, running: Request, now: float) -> bool:
        """Whether the newcomer is of a better level; within a level, quanta are not cut short."""
        return self._ranks[newcomer.key][0] < self._ranks[running.key][0]

    def served(self, served: Sequence[tuple[Request, int]], now: float) -> None:
        """Demote who used up the quantum."""
        ends = self._quantum_ends
        for request, _ in served:
            key = request.key
            if request.num_tokens >= ends[key]:
                level = int(self._ranks[key][0]) + 1
                self._ranks[key] = (float(level), now)
                ends[key] += _QUANTA[level]

    def finished(self, request: Request) -> None:
        """Forget the request."""
        self._ranks.pop(request.key, None)
        self._quantum_ends.pop(request.key, None)
