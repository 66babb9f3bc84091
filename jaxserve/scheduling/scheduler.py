"""Continuous batching: what every step computes, decided on the host from counters alone.

A small mechanism under a token budget and a page budget; who goes first is the policy's word.
Decodes come before prompt chunks, and each chunk takes what is left of the budget, so decodes
never wait for a long prompt: chunked prefill with stall-free batching, from Sarathi-Serve
(Agrawal et al., OSDI 2024). Pages are given out as tokens need them, as in vLLM's PagedAttention
(Kwon et al., SOSP 2023), shared where requests begin alike, and when they run out, a request is
preempted: its pages are swapped out or left to the cache, and what is gone is computed again.
"""

import itertools
from collections.abc import Mapping, Sequence
from operator import attrgetter

from jaxserve.cache.page_map import PageMap
from jaxserve.cache.page_pool import PageCounts, PagePool
from jaxserve.core.errors import ConfigError, InvalidRequest, QueueFull
from jaxserve.core.request import FinishReason, Request, RequestState
from jaxserve.core.step import FetchDone, StepPlan, StepResult
from jaxserve.scheduling.admission import Admission
from jaxserve.scheduling.counts import CacheCounts
from jaxserve.scheduling.page_traffic import PageTraffic, Store
from jaxserve.scheduling.policies import Policy
from jaxserve.scheduling.request_pages import RequestPages
from jaxserve.scheduling.settings import SchedulerSettings
from jaxserve.scheduling.shard import Shard
from jaxserve.scheduling.token_budget import FixedBudget

_KEY, _NUM_TOKENS = map(attrgetter, ("key", "num_tokens"))  # of a row


class Scheduler:
    """Decides, step by step, which requests compute how many tokens in which pages.

    The caller's loop is `plan`, launch, collect, `commit`; with overlap, `plan` for step N+1
    comes before `commit` of step N. Deterministic: the same calls give the same plans. Not
    thread-safe; one step costs O(running requests), however many wait.

    Args:
        page_pools: the KV pages of each data shard.
        page_size: tokens per page.
        max_num_seqs: requests that run at once, over all shards. Slots are numbered through:
            shard s owns s*n .. (s+1)*n - 1, where n = max_num_seqs / shards.
        max_num_batched_tokens: tokens of one step, over all shards (split evenly).
        max_model_len: longest prompt plus answer, in tokens.
        max_waiting: requests that may wait before `add` refuses more.
        policy: the order in which requests are served.
        store: where pages go that the device has no room for; None if they are just dropped.
        settings: the mechanism's switches.

    Raises:
        ConfigError: the limits cannot be split over the shards.
    """

    def __init__(
        self,
        *,
        page_pools: Sequence[PagePool],
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_waiting: int,
        policy: Policy,
        store: Store | None = None,
        settings: SchedulerSettings | None = None,
    ) -> None:
        num_shards = len(page_pools)
        if num_shards == 0 or max_num_seqs < 1 or max_num_seqs % num_shards:
            raise ConfigError(f"max_num_seqs {max_num_seqs} cannot be split over {num_shards}")
        if max_num_batched_tokens < num_shards:
            raise ConfigError(
                f"max_num_batched_tokens {max_num_batched_tokens} is less than one token for each "
                f"of {num_shards} data shards"
            )
        self._settings = settings = settings or SchedulerSettings()
        self._traffic = PageTraffic(store)
        per_shard = max_num_seqs // num_shards
        self._shards = [
            Shard(
                i,
                RequestPages(i, pool, page_size, self._traffic, settings.prefix_cache),
                range(i * per_shard, (i + 1) * per_shard),
                page_size,
                settings.admission,
                settings.probe_every,
            )
            for i, pool in enumerate(page_pools)
        ]
        self._page_size = page_size
        self._smallest_pool = min(pool.num_total for pool in page_pools)
        self._budget = settings.token_budget or FixedBudget(max_num_batched_tokens)
        self._max_model_len = max_model_len
        self._max_waiting = max_waiting
        self._policy = policy
        self._admission = Admission(self._shards, policy, settings, page_size)
        self._waiting = self._admission.waiting
        self._active: dict[int, Request] = {}  # by key: every unfinished request
        self._by_id: dict[str, Request] = {}
        self._shed: list[Request] = []

    # Requests come and go.

    def add(self, request: Request) -> None:
        """Queue a new request, cut to the context.

        Raises:
            QueueFull: `max_waiting` requests wait already.
            InvalidRequest: the id is in use, or the request could not be served even alone.
        """
        if request.request_id in self._by_id:
            raise InvalidRequest(f"request id {request.request_id!r} is already in use")
        self._require_servable(request)
        if len(self._waiting) >= self._max_waiting:
            raise QueueFull(f"{len(self._waiting)} requests are waiting; try again later")
        now = request.last_progress = request.arrival_time
        self._shards[0].pages.update_keys(request)
        if self._policy.traits.refreshes:
            self._admission.look_up(request)
        self._active[request.key] = self._by_id[request.request_id] = request
        self._policy.arrived(request, now)
        self._waiting.push(request, now)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> bool:
        """End a request now and take back all it holds; tokens still on the device are dropped.

        Returns:
            Whether there was such an unfinished request.
        """
        request = self._by_id.get(request_id)
        if request is None:
            return False
        self._finish(request, reason)
        return True

    def _require_servable(self, request: Request) -> None:
        request.fit(self._max_model_len)
        # The last token of an answer is never fed back, so it needs no KV.
        kv_tokens = request.max_num_tokens - 1
        capacity = self._smallest_pool * self._page_size
        if kv_tokens > capacity:
            raise InvalidRequest(
                f"prompt and answer of up to {kv_tokens + 1} tokens do not fit the KV cache of "
                f"{capacity} tokens; shorten the prompt or lower max_tokens",
                param="max_tokens",
            )

    def _finish(self, request: Request, reason: FinishReason) -> None:
        del self._active[request.key], self._by_id[request.request_id]
        if request.state is RequestState.RUNNING:
            self._shards[request.shard].stop(request)
        else:
            self._waiting.discard(request)
        self._shards[request.shard].pages.drop_swapped(request)
        request.num_tokens -= request.num_pending_tokens
        request.num_pending_tokens = 0
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        self._policy.finished(request)

    # One step.

    def plan(self, now: float) -> StepPlan | None:
        """Decide the next step and count it as launched.

        Args:
            now: the current time in seconds, on the clock of `Request.arrival_time`.

        Returns:
            The step, rows grouped by shard, or None when there is nothing to do now (no work
            at all, or all of it waits for a commit or for pages from the store).
        """
        self._admission.begin_step(now)
        budget = self._budget.tokens(self.num_running) // len(self._shards)
        for shard in self._shards:
            shard.begin_step(max(budget, 1), self._admission.ranking, now)
        self._admission.make_room(now)
        self._serve_all(now)
        for request in self._admission.take_given_up():
            self._finish(request, FinishReason.SHED)
            self._shed.append(request)
        for shard in self._shards:
            shard.pages.end_step()
        rows = tuple(itertools.chain.from_iterable(shard.rows for shard in self._shards))
        saves, copies, fetches = self._traffic.take()
        if not (rows or saves or copies or fetches):
            return None
        if self._policy.traits.counts_service:
            served = map(self._active.__getitem__, map(_KEY, rows))
            self._policy.served(list(zip(served, map(_NUM_TOKENS, rows), strict=True)), now)
        return StepPlan(rows, saves, copies, fetches)

    def _serve_all(self, now: float) -> None:
        """Give rows: decodes, then chunks of running prompts, then of new ones."""
        work = [(shard, *shard.work()) for shard in self._shards]
        if not self._settings.prefill_first:
            for shard, decodes, _ in work:
                self._serve_decodes(shard, decodes, now)
        for shard, _, prefills in work:
            for request in prefills:
                # Not if preempted a moment ago.
                if shard.budget and request.state is RequestState.RUNNING:
                    self._serve_one(shard, request, now)
        self._admission.admit(now)
        if self._settings.prefill_first and not any(shard.rows for shard in self._shards):
            for shard, decodes, _ in work:
                self._serve_decodes(shard, decodes, now)

    def _serve_decodes(self, shard: Shard, requests: Sequence[Request], now: float) -> None:
        unserved = iter(requests)
        while (request := shard.add_decodes(unserved, now)) is not None:
            self._serve_one(shard, request, now)

    def _serve_one(self, shard: Shard, request: Request, now: float) -> None:
        """Give a running request its row, at the cost of requests after it in policy order.

        None is preempted for a request that comes later than all without a row: it sits
        out this step and keeps its pages until one before it wants them. The first in
        order thus always gets its row, or all the others have theirs: each plan makes progress.
        """
        wanted = min(request.num_tokens - request.num_computed_tokens, shard.budget)
        while (granted := shard.pages.grow(request, wanted)) == 0:
            victim = shard.victim()
            if victim is None or victim is request:
                shard.is_short = True
                return
            self._admission.preempt(shard, victim, now)
        shard.is_short |= granted < wanted
        shard.add_row(request, granted, now)

    # What became of it.

    def commit(
        self, plan: StepPlan, result: StepResult, finished: Mapping[int, FinishReason]
    ) -> None:
        """Take in what a step sampled. Steps are committed in the order they were planned.

        Tokens of requests that ended since the step was launched are dropped; a request that was
        preempted since then still gets its token.

        Args:
            plan: the step.
            result: its tokens.
            finished: by `Request.key`, the requests that end with their token of this step.

        Raises:
            ValueError: plan and result do not match, or a request has all its tokens and is
                not in `finished`: it would wait for ever.
        """
        active = self._active
        for row, token in zip(plan.rows, result.token_ids.tolist(), strict=True):
            request = active.get(row.key)
            if request is None or not row.samples:
                continue
            request.output_token_ids.append(token)
            request.num_pending_tokens -= 1
            if row.key in finished:
                self._finish(request, finished[row.key])
            elif not request.num_pending_tokens and request.has_all_tokens:
                raise ValueError(f"request {request.request_id!r} is over but not finished")

    def fetched(self, done: FetchDone, now: float) -> None:
        """Take in pages from the store: their request goes on after them.

        Args:
            done: the outcome; pages that could not be filled are computed instead.
            now: seconds.

        Raises:
            ValueError: no such fetch is under way.
        """
        fetch = self._traffic.done(done)
        shard, request = self._shards[fetch.shard], fetch.request
        if request.fetch_ticket != done.ticket:  # it ended meanwhile
            shard.pool.free(fetch.pages)
            return
        self._admission.preemption.observe_fetch(len(fetch.pages), max(now - fetch.started, 1e-9))
        before = request.num_computed_tokens
        shard.pages.finish_fetch(request, fetch.pages, done.num_pages)
        num_fetched = request.num_computed_tokens - before
        self._admission.cache_counts.fetched(request, num_fetched)
        if request.num_reused_tokens is None:
            request.num_fetched_tokens = num_fetched
        self._admission.begin_computing(shard, request)

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """Learn from how long a step took."""
        num_tokens = plan.num_tokens
        if not num_tokens:
            return
        self._budget.observe(num_tokens, seconds)
        if num_tokens > 4 * len(plan.rows):
            self._admission.preemption.observe_prefill(num_tokens, seconds)

    def take_shed(self) -> list[Request]:
        """Requests that were given up since the last call, `FinishReason.SHED`."""
        shed, self._shed = self._shed, []
        return shed

    def save_cache(self) -> StepPlan | None:
        """A last plan, for an idle engine that closes: all cached pages go to the store."""
        if self._traffic.store is None or self.has_work:
            return None
        for shard in self._shards:
            for page, key in shard.pool.cached_pages():
                self._traffic.save(shard.index, page, key)
        saves, _, _ = self._traffic.take()
        return StepPlan((), saves) if saves else None

    # What the engine may ask.

    @property
    def num_waiting(self) -> int:
        """Requests without a slot, preempted ones included."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return sum(len(shard.running) for shard in self._shards)

    @property
    def num_fetches(self) -> int:
        """Fetches from the page store under way."""
        return self._traffic.num_fetches

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._active)

    @property
    def num_preemptions(self) -> int:
        """Preemptions so far, over all requests."""
        return self._admission.num_preemptions

    @property
    def cache_counts(self) -> CacheCounts:
        """What the caches had of the requests that started."""
        return self._admission.cache_counts

    @property
    def page_counts(self) -> PageCounts:
        """Pages over all shards, by state."""
        pools = [shard.pool for shard in self._shards]
        return PageCounts(
            free=sum(pool.num_free for pool in pools),
            cached=sum(pool.num_cached for pool in pools),
            used=sum(pool.num_used for pool in pools),
            total=sum(pool.num_total for pool in pools),
        )

    def page_maps(self, max_bins: int) -> list[PageMap]:
        """Per shard, where its used and cached pages lie, in at most so many bins together.

        For any thread.
        """
        bins = max(1, max_bins // len(self._shards))
        return [shard.pool.page_map(bins) for shard in self._shards]

    def get(self, request_id: str) -> Request | None:
        """The unfinished request of that id."""
        return self._by_id.get(request_id)

    def get_by_key(self, key: int) -> Request | None:
        """The unfinished request of that key (`StepRow.key`)."""
        return self._active.get(key)

    def check(self) -> None:
        """Verify all books; O(everything), for tests and for the idle engine.

        Raises:
            AssertionError: a slot or page is lost or owned twice, or a state is wrong.
        """
        for shard in self._shards:
            shard.check(self._traffic.abandoned_pages(shard.index))
            for request in shard.running:
                assert request.state is RequestState.RUNNING and request.key in self._active
                assert request.shard == shard.index and request not in self._waiting
                held = len(request.page_ids) * self._page_size
                assert (
                    held >= request.num_computed_tokens
                    or request.num_tokens >= request.max_num_tokens
                )
        requests = list(self._active.values())
        waiting = [request for request in requests if request in self._waiting]
        assert len(waiting) == len(self._waiting)
        assert len(waiting) + self.num_running == len(requests) == len(self._by_id)
        for request in waiting:
            assert request.state is RequestState.WAITING
            assert request.slot is None and not request.page_ids
