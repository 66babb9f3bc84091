"""A language model made of a hash, and an executor that runs it under real plans, without JAX.

Good for testing whatever stands above an executor: the next token depends on every token before
it, read from a fake KV cache through the plan's own page numbers, so a wrong page, a stale page or
a wrong start shows up as a wrong token.
"""

import dataclasses
import hashlib
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from jaxserve.cache.page_store import PageStore
from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.request import Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.step import (
    FetchDone,
    PageFetch,
    SamplingExtras,
    StepPlan,
    StepResult,
    StepRow,
)
from jaxserve.testing.plan_checks import check_plan, fetch_pages

_UNWRITTEN = -1  # no token has this id, so reading it changes every hash


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeModel:
    """Next token = hash of all tokens so far and of the seed.

    Attributes:
        vocab_size: tokens are 0 .. vocab_size-1.
        eos_token_id: the token that ends an answer, or None if there is no such token.
        eos_probability: how often the next token is EOS.
    """

    vocab_size: int = 1000
    eos_token_id: int | None = None
    eos_probability: float = 0.0

    def next_token(self, history: Sequence[int] | np.ndarray, seed: int) -> int:
        """The token after `history`, int [tokens]; `seed` as the hash's key, in [0, 2**64)."""
        data = np.ascontiguousarray(history, dtype=np.int32).tobytes()
        digest = hashlib.blake2b(data, digest_size=16, key=seed.to_bytes(8, "little")).digest()
        if self.eos_token_id is None:
            return int.from_bytes(digest[:8], "little") % self.vocab_size
        if int.from_bytes(digest[8:], "little") < self.eos_probability * 2.0**64:
            return self.eos_token_id
        token = int.from_bytes(digest[:8], "little") % (self.vocab_size - 1)
        return token + (token >= self.eos_token_id)

    def sampling_seed(self, params: SamplingParams, seed: int) -> int:
        """The seed that counts: none for greedy requests, as in a real sampler."""
        return 0 if params.greedy else seed

    def generate(self, request: Request, stop_token_ids: Collection[int] = ()) -> list[int]:
        """The oracle: all output tokens of a request that is served alone, without any pages.

        Stops after `request.max_tokens` tokens or after one of `stop_token_ids`, which is kept.
        """
        seed = self.sampling_seed(request.params, request.seed)
        tokens = list(request.prompt_token_ids)
        for _ in range(request.max_tokens):
            tokens.append(self.next_token(tokens, seed))
            if tokens[-1] in stop_token_ids:
                break
        return tokens[len(request.prompt_token_ids) :]


@dataclasses.dataclass(frozen=True)
class FakeHandle:
    """A launched step: its number and when it is over, on the monotonic clock."""

    number: int
    done_at: float


class FakeExecutor:
    """Implements `core.step.Executor` with a `FakeModel`.

    Of what shapes the sampling of late rows it knows masks and biases: the token that the hash
    names, or else the next one that is allowed; a bias of 50 or more makes a token the only one,
    one of -50 or less forbids it. Log-probabilities are made up from the tokens' numbers.

    Steps take effect at launch, in order; results are handed out at collect. So do saves and
    copies, while fetches are done in `poll`, in order, and leave garbage in their pages until then.
    The hidden state of a probed row is its key and its end, so that one sees whose it is; that of
    a token, where all are wanted, is the token and its position.

    Args:
        page_size: tokens per page.
        model: what computes the tokens.
        step_seconds: how long a step keeps the pretended device busy; `collect` sleeps for it.
        store: where pages are saved and fetched, closed by `close`: int32 pages of the shape
            [page_size], the tokens whose KV a real page would hold.
        fetch_polls: how many calls of `poll` it takes until a fetch is done; a waiting one is
            enough for the oldest.
    """

    def __init__(
        self,
        *,
        page_size: int,
        model: FakeModel | None = None,
        step_seconds: float = 0.0,
        store: PageStore | None = None,
        fetch_polls: int = 1,
    ) -> None:
        self.model = model or FakeModel()
        self.plans: list[StepPlan] = []
        self._page_size = page_size
        self._step_seconds = step_seconds
        self._busy_until = 0.0
        self._pages: dict[tuple[int, int], np.ndarray] = {}  # (shard, page) -> int32 [page_size]
        self._last_token: dict[int, int] = {}  # by slot
        self._store = store
        self._fetch_polls = fetch_polls
        self._fetches: deque[tuple[PageFetch, int]] = deque()  # and the polls it still takes
        self._tickets: set[int] = set()  # of all fetches ever
        self._results: deque[tuple[FakeHandle, StepResult]] = deque()
        self._unsampled: FakeHandle | None = None  # the step launched last, if it is late

    def launch(self, plan: StepPlan) -> FakeHandle:
        """Run one step.

        Raises:
            ValueError: the plan contradicts itself; the message says where.
        """
        fetching = set().union(*(fetch_pages(fetch) for fetch, _ in self._fetches))
        check_plan(plan, self._page_size, fetching)
        self._move_pages(plan)
        # All rows write before any is sampled, as on a device: a page shared by mistake shows.
        if self._unsampled is not None:
            raise ValueError(f"step {self._unsampled.number} is not sampled yet")
        for row in plan.rows:
            self._write(row)
        self._busy_until = max(time.monotonic(), self._busy_until) + self._step_seconds
        handle = FakeHandle(len(self.plans), self._busy_until)
        self.plans.append(plan)
        self._unsampled = handle
        if not plan.is_late:
            self._sample_rows(handle, {})
        return handle

    def sample(self, handle: FakeHandle, extras: Mapping[int, SamplingExtras]) -> None:
        """Sample a step whose plan is late.

        Raises:
            ValueError: it was sampled already, or a row that is not late has extras.
        """
        if handle != self._unsampled:
            raise ValueError(f"step {handle.number} is not the one to be sampled")
        rows = self.plans[handle.number].rows
        early = [i for i in extras if not rows[i].late]
        if early:
            raise ValueError(f"rows {early} have extras and are not late")
        self._sample_rows(handle, extras)

    def _sample_rows(self, handle: FakeHandle, extras: Mapping[int, SamplingExtras]) -> None:
        rows = self.plans[handle.number].rows
        tokens = [self._sample(row, extras.get(i)) for i, row in enumerate(rows)]
        logprobs = {
            i: made_up_logprobs(token, row.params.logprobs, self.model.vocab_size)
            for i, (row, token) in enumerate(zip(rows, tokens, strict=True))
            if row.samples and row.late and row.params.logprobs is not None
        }
        probed = [(row.key, row.end) for row in rows if row.probe]
        hidden = np.array(probed, np.float32) if probed else None
        token_hidden = {
            i: np.array(
                [(token, n) for n, token in enumerate(row.token_ids, row.start)], np.float32
            )
            for i, row in enumerate(rows)
            if row.wants_hidden
        }
        result = StepResult(np.array(tokens, np.int32), hidden, logprobs, token_hidden)
        self._results.append((handle, result))
        self._unsampled = None

    def score(
        self, hidden: np.ndarray, token_ids: Sequence[int], num_top: int
    ) -> list[TokenLogprobs]:
        """Made-up log-probabilities; see `Executor.score`."""
        assert len(hidden) == len(token_ids)
        return [made_up_logprobs(token, num_top, self.model.vocab_size) for token in token_ids]

    def collect(self, handle: FakeHandle) -> StepResult:
        """Wait for the step and return its tokens.

        Raises:
            ValueError: another step should be collected first, or this one was already.
        """
        if not self._results or self._results[0][0] != handle:
            raise ValueError(f"step {handle.number} is not the next to be collected")
        if self._step_seconds:
            time.sleep(max(0.0, handle.done_at - time.monotonic()))
        return self._results.popleft()[1]

    def poll(self, *, wait: bool = False) -> list[FetchDone]:
        """Fill the pages of the fetches that are due; see `Executor.poll`."""
        self._fetches = deque((fetch, polls - 1) for fetch, polls in self._fetches)
        done: list[FetchDone] = []
        while self._fetches and (self._fetches[0][1] <= 0 or (wait and not done)):
            fetch, _ = self._fetches.popleft()
            done.append(FetchDone(fetch.ticket, self._put(fetch)))
        return done

    def close(self) -> None:
        """Give up the fetches and close the store. Idempotent."""
        self._fetches.clear()
        if self._store is not None:
            self._store.close()

    def _move_pages(self, plan: StepPlan) -> None:
        if self._store is None and (plan.saves or plan.fetches):
            raise ValueError("a plan saves or fetches pages, and there is no page store")
        for save in plan.saves:
            assert self._store is not None
            self._store.put(save.key, self._page(save.shard, save.page))
        for copy in plan.copies:
            self._page(copy.shard, copy.target)[:] = self._page(copy.shard, copy.source)
        for fetch in plan.fetches:
            if fetch.ticket in self._tickets:
                raise ValueError(f"there was a fetch of ticket {fetch.ticket} already")
            self._tickets.add(fetch.ticket)
            self._fetches.append((fetch, self._fetch_polls))
            for shard, page in fetch_pages(fetch):
                self._page(shard, page)[:] = _UNWRITTEN

    def _put(self, fetch: PageFetch) -> int:
        """Fill pages as far as the store has them; returns how many."""
        assert self._store is not None
        contents = np.empty((len(fetch.keys), self._page_size), np.int32)
        count = self._store.fetch(fetch.keys, contents)
        for page, content in zip(fetch.pages[:count], contents, strict=False):
            self._page(fetch.shard, page)[:] = content
        return count

    def _write(self, row: StepRow) -> None:
        tokens = row.token_ids
        if len(tokens) < row.num_tokens:
            tokens = (*tokens, self._last_token.get(row.slot, _UNWRITTEN))
        for position, token in enumerate(tokens, row.start):
            page, offset = divmod(position, self._page_size)
            self._page(row.shard, row.page_ids[page])[offset] = token

    def _sample(self, row: StepRow, extras: SamplingExtras | None) -> int:
        if not row.samples:
            return -1
        pages = [self._page(row.shard, page) for page in row.page_ids]
        history = np.concatenate(pages)[: row.end]
        seed = self.model.sampling_seed(row.params, row.seed)
        token = self.model.next_token(history, seed)
        if row.late:
            token = self._shaped(token, row.params, extras)
        self._last_token[row.slot] = token
        return token

    def _shaped(self, token: int, params: SamplingParams, extras: SamplingExtras | None) -> int:
        """The first allowed token from `token` on."""
        allowed = np.ones(self.model.vocab_size, bool)
        if extras is not None and extras.mask is not None:
            bits = np.unpackbits(extras.mask.view(np.uint8), bitorder="little")
            allowed &= bits[: self.model.vocab_size].astype(bool)
        for biased, value in params.biases:
            if value >= 50 and allowed[biased]:
                return biased
            allowed[biased] &= value > -50
        order = np.roll(np.arange(self.model.vocab_size), -token)
        return int(order[np.argmax(allowed[order])])

    def _page(self, shard: int, page: int) -> np.ndarray:
        """A page's tokens, int32 [page_size], to be read or changed."""
        if (shard, page) not in self._pages:
            self._pages[shard, page] = np.full(self._page_size, _UNWRITTEN, np.int32)
        return self._pages[shard, page]


def made_up_logprobs(token_id: int, num_top: int | None, vocab_size: int) -> TokenLogprobs:
    """What a `FakeExecutor` says of a token: that it is the most likely, then those after it."""
    top = tuple((token_id + i) % vocab_size for i in range(num_top or 0))
    return TokenLogprobs(token_id, -0.5, 1, top, tuple(-0.5 - i for i in range(len(top))))
