"""What passes between the scheduler and the executor of a step: plans and results."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.sampling_params import SamplingParams


class StepRow(NamedTuple):
    """One request's part in one step: some of its next tokens, and where its KV lives.

    A named tuple and no dataclass: hundreds are made every step, at a fifth of the cost.

    Attributes:
        key: the request's never-reused number (`Request.key`).
        slot: row of the device's last-token map; the sampled token is stored there.
        shard: index on the mesh's data axis; `page_ids` are local to it.
        start: absolute position of the first token of this step.
        num_tokens: tokens computed in this step.
        token_ids: their values, known to the host; shorter than `num_tokens` by one when the
            last one is still only on the device, in `slot` of the last-token map.
        page_ids: pages that hold positions 0 .. start + num_tokens - 1, in order; those before
            the page of `start` may be shared and are only read.
        samples: whether a next token is sampled after the last token of this row.
        params, seed: how it is sampled; the random key is fold_in(seed, start + num_tokens).
        probe: whether the last hidden state of this row is wanted in the result.
        late: whether it is sampled by `Executor.sample`, once the host knows all tokens before
            (see `SamplingExtras`), and not by `Executor.launch`.
        wants_hidden: whether the hidden states of all its tokens are wanted in the result.
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
    probe: bool = False
    late: bool = False
    wants_hidden: bool = False

    @property
    def end(self) -> int:
        """Position after the last token of this step: the row's context length."""
        return self.start + self.num_tokens


class SamplingExtras(NamedTuple):
    """What a late row's token depends on beside the row itself.

    Penalties, biases and how many log-probabilities are wanted stand in the row's `params`.

    Attributes:
        mask: uint32 [ceil(vocabulary / 32)]: token t may be sampled if bit t % 32 of word t // 32
            is set; None: all may.
        history: the request's tokens so far, the prompt's first; empty if its params have no
            penalties.
        num_prompt_tokens: how many of them are the prompt's.
    """

    mask: np.ndarray | None = None
    history: Sequence[int] = ()
    num_prompt_tokens: int = 0


class PageSave(NamedTuple):
    """A page's contents are wanted in the page store, under `key`."""

    shard: int
    page: int
    key: bytes


class PageCopy(NamedTuple):
    """A page's contents are wanted in another page of the same shard as well."""

    shard: int
    source: int
    target: int


class PageFetch(NamedTuple):
    """Pages are to be filled from the page store, in the background.

    Attributes:
        ticket: number under which `Executor.poll` reports the outcome; never reused.
        shard: whose pages.
        pages: the pages to fill, in the order of the request's tokens.
        keys: what the store keeps their contents under, one key per page.
    """

    ticket: int
    shard: int
    pages: tuple[int, ...]
    keys: tuple[bytes, ...]


class FetchDone(NamedTuple):
    """The outcome of `PageFetch`: so many of its pages, from the first on, have been filled."""

    ticket: int
    num_pages: int


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One step: page movements, then the rows, at most one per running request.

    On the device all happens in this order: `saves` read pages before anything overwrites them,
    `copies` come next, then the rows write and read their own. `fetches` only start here: their
    pages belong to requests without a row, until `Executor.poll` says that they are filled.

    Attributes:
        rows: in launch order; may be empty when pages are to be moved.
        saves, copies, fetches: see the classes.
    """

    rows: tuple[StepRow, ...]
    saves: tuple[PageSave, ...] = ()
    copies: tuple[PageCopy, ...] = ()
    fetches: tuple[PageFetch, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Query tokens in the step, over all rows."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def is_late(self) -> bool:
        """Whether the step is only sampled once `Executor.sample` is called for it."""
        return any(row.late for row in self.rows)


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step produced.

    Attributes:
        token_ids: int32 [rows]: the sampled token of each row of the plan, -1 where the row
            did not sample.
        hidden: float32 [probed rows, hidden]: last hidden states of the rows with `probe`, in
            their order; None if there are none.
        logprobs: of the sampled token, by index of the row; of rows whose params ask for them.
        token_hidden: by index of the row, float32 [num_tokens, hidden]: the last layer's hidden
            states, after the final norm, of all tokens of the rows with `wants_hidden`.
    """

    token_ids: np.ndarray
    hidden: np.ndarray | None = None
    logprobs: Mapping[int, TokenLogprobs] = dataclasses.field(default_factory=dict)
    token_hidden: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)


class Executor(Protocol):
    """Runs step plans: the real device runner, a fake for tests, later a cost model.

    Steps run in launch order, and `collect` is called once per launch, in that order.
    `launch` must not wait for the step; `collect` does.
    """

    def launch(self, plan: StepPlan) -> Any:
        """Start one step and return a handle for `collect`.

        If the plan is late (`StepPlan.is_late`), none of its rows is sampled yet: `sample` has
        to be called before the next `launch` and before the step is collected. So the device
        computes the layers while the host still works on the tokens of the step before.
        """
        ...

    def sample(self, handle: Any, extras: Mapping[int, SamplingExtras]) -> None:
        """Sample a launched step whose plan is late; returns before it has run.

        Args:
            handle: what `launch` returned.
            extras: by index of the row; late rows without any have no mask and no history. What
                their params alone say (biases, log-probabilities) holds for them as well.
        """
        ...

    def score(
        self, hidden: np.ndarray, token_ids: Sequence[int], num_top: int
    ) -> list[TokenLogprobs]:
        """How likely the model thinks some tokens, each after its own hidden state; waits.

        Args:
            hidden: float32 [tokens, hidden], as in `StepResult.token_hidden`.
            token_ids: the token that comes after each.
            num_top: how many of the most likely tokens to tell, at most `MAX_LOGPROBS`.
        """
        ...

    def collect(self, handle: Any) -> StepResult:
        """Wait for a launched step and return what it sampled."""
        ...

    def poll(self, *, wait: bool = False) -> list[FetchDone]:
        """The page fetches that came to an end since the last call.

        Steps launched from now on see the pages' contents.

        Args:
            wait: block until there is at least one, if any is under way.
        """
        ...

    def close(self) -> None:
        """Finish what is under way and keep what is to be kept (pages on disk). Idempotent."""
        ...
