"""FastServe's skip-join multi-level feedback queue."""

import math
from collections.abc import Sequence

from jaxserve.core.request import Request
from jaxserve.scheduling.policies.base import Policy, Priority, Traits

QUANTA = (*(8.0 * 2**level for level in range(7)), math.inf)  # answer tokens, per level
PROMPT_TOKENS_PER_ANSWER_TOKEN = 32.0  # cost as much: a decode's step reads all weights, too


class MultiLevelFeedbackQueue(Policy):
    """Shortest first without predictions: who has had much service yields to who had little.

    From "Fast Distributed Inference Serving for Large Language Models" (FastServe, Wu et al.,
    2023). Requests of a level go in the order in which they joined it. One that used up the
    level's quantum is demoted, and yields its place to any newcomer of a better level. Levels
    whose quantum could not even pay for a prompt are skipped. Here the starvation timeout promotes
    who waited too long, and quanta are in answer tokens instead of seconds: they depend neither
    on the machine nor on who shares a step. What is computed again is not charged.
    """

    traits = Traits(reranks=True, displaces=True, counts_service=True)

    def __init__(self) -> None:
        self._ranks: dict[int, tuple[float, float]] = {}  # (level, when it joined the level)
        self._ends: dict[int, float] = {}  # of its quantum, in `Request.num_tokens`

    def arrived(self, request: Request, now: float) -> None:
        """Join the first level whose quantum pays for the prompt."""
        cost = len(request.prompt_token_ids) / PROMPT_TOKENS_PER_ANSWER_TOKEN
        level = next(i for i, quantum in enumerate(QUANTA) if cost < quantum)
        self._ranks[request.key] = (float(level), request.arrival_time)
        self._ends[request.key] = len(request.prompt_token_ids) + QUANTA[level] - cost

    def priority(self, request: Request, now: float) -> Priority:
        """(level from 0 on, when the request joined it in seconds)."""
        return self._ranks[request.key]

    def priorities(self, requests: Sequence[Request], now: float) -> Sequence[Priority]:
        """`priority` of each."""
        return [self._ranks[request.key] for request in requests]

    def displaces(self, newcomer: Request, running: Request, now: float) -> bool:
        """Whether the newcomer is of a better level; within a level, quanta are not cut short."""
        return self._ranks[newcomer.key][0] < self._ranks[running.key][0]

    def served(self, served: Sequence[tuple[Request, int]], now: float) -> None:
        """Demote who used up the quantum."""
        for request, _ in served:
            if request.num_tokens >= self._ends[request.key]:
                level = self._ranks[request.key][0] + 1
                self._ranks[request.key] = (level, now)
                self._ends[request.key] += QUANTA[int(level)]

    def finished(self, request: Request) -> None:
        """Forget the request."""
        self._ranks.pop(request.key, None)
        self._ends.pop(request.key, None)
