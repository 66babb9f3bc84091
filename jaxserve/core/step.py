"""What passes between the scheduler and whatever runs a step: plans, results, executors."""

import dataclasses
from typing import Any, Protocol

import numpy as np

from jaxserve.core.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRow:
    """One request's part in one step: some of its next tokens, and where its KV lives.

    Attributes:
        key: the request's never-reused number (`Request.key`).
        slot: row of the device's last-token map; the sampled token is stored there.
        shard: index on the mesh's data axis; `page_ids` are local to it.
        start: absolute position of the first token of this step.
        num_tokens: tokens computed in this step.
        token_ids: their values, known to the host; shorter than `num_tokens` by one when the
            last one is still only on the device, in `slot` of the last-token map.
        page_ids: pages that hold positions 0 .. start + num_tokens - 1, in order.
        samples: whether a next token is sampled after the last token of this row.
        params, seed: how it is sampled; the random key is fold_in(seed, start + num_tokens).
    """

    key: int
    slot: int
    shard: int
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    page_ids: tuple[int, ...]
    samples: bool
    params: SamplingParams
    seed: int

    @property
    def end(self) -> int:
        """Position after the last token of this step: the row's context length."""
        return self.start + self.num_tokens


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The rows of one step, at most one per running request, in launch order."""

    rows: tuple[StepRow, ...]

    @property
    def num_tokens(self) -> int:
        """Query tokens in the step, over all rows."""
        return sum(row.num_tokens for row in self.rows)


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step produced.

    Attributes:
        token_ids: int32 [rows]: the sampled token of each row of the plan, -1 where the row
            did not sample.
    """

    token_ids: np.ndarray


class Executor(Protocol):
    """Runs step plans: the real device runner, a fake for tests, later a cost model.

    Steps run in launch order, and `collect` is called once per launch, in that order.
    `launch` must not wait for the step; `collect` does.
    """

    def launch(self, plan: StepPlan) -> Any:
        """Start one step and return a handle for `collect`."""
        ...

    def collect(self, handle: Any) -> StepResult:
        """Wait for a launched step and return what it sampled."""
        ...
