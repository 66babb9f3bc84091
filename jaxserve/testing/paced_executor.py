"""A device that answers at a steady pace and costs the host next to nothing."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.step import FetchDone, SamplingExtras, StepPlan, StepResult


class _Step(NamedTuple):
    plan: StepPlan
    done_at: float


class PacedExecutor:
    """Implements `core.step.Executor`: every step takes the same time, every token is the same.

    For measuring what stands above a device. Real devices compute while the host does other
    things; so does this one, by sleeping. It samples no late rows, and moves no pages.

    Args:
        step_seconds: of one step; the next begins when it was launched and this one is over.
        token_id: what every row samples.
    """

    def __init__(self, step_seconds: float, token_id: int) -> None:
        self._step_seconds = step_seconds
        self._token_id = token_id
        self._busy_until = 0.0

    def launch(self, plan: StepPlan) -> _Step:
        """Begin a step."""
        self._busy_until = max(time.monotonic(), self._busy_until) + self._step_seconds
        return _Step(plan, self._busy_until)

    def sample(self, handle: _Step, extras: Mapping[int, SamplingExtras]) -> None:
        """Rows with extras get the same token as all others."""

    def score(
        self, hidden: np.ndarray, token_ids: Sequence[int], num_top: int
    ) -> list[TokenLogprobs]:
        """Not offered.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a paced executor knows no probabilities")

    def collect(self, handle: _Step) -> StepResult:
        """Wait until a step is over."""
        time.sleep(max(0.0, handle.done_at - time.monotonic()))
        rows = handle.plan.rows
        samples = np.fromiter((row.samples for row in rows), bool)
        token_hidden = {
            i: np.ones((row.num_tokens, 1), np.float32)
            for i, row in enumerate(rows)
            if row.wants_hidden
        }
        token_ids = np.where(samples, self._token_id, -1).astype(np.int32)
        return StepResult(token_ids, token_hidden=token_hidden)

    def poll(self, *, wait: bool = False) -> list[FetchDone]:
        """There are no fetches."""
        return []

    def close(self) -> None:
        """Nothing is to be kept."""
