"""Continuous batching: what every step computes, decided on the host from counters alone.

Running requests come first, each prompt chunk takes what is left of a fixed token budget, so
decodes never wait for a long prompt: chunked prefill with stall-free batching, from
Sarathi-Serve (Agrawal et al., OSDI 2024). Pages are given out as tokens need them, as in vLLM's
PagedAttention (Kwon et al., SOSP 2023), and when they run out, a request is preempted by
recomputation: it gives back its pages and later computes prompt and answer so far again.
"""

from collections.abc import Mapping, Sequence

from jaxserve.cache.page_pool import PageCounts, PagePool
from jaxserve.core.errors import ConfigError, InvalidRequest, QueueFull
from jaxserve.core.request import FinishReason, Request, RequestState
from jaxserve.core.step import StepPlan, StepResult
from jaxserve.scheduling.policies import Policy
from jaxserve.scheduling.shard import Shard
from jaxserve.scheduling.waiting_queue import Ranked, WaitingQueue


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
    ) -> None:
        num_shards = len(page_pools)
        if num_shards == 0 or max_num_seqs < 1 or max_num_seqs % num_shards:
            raise ConfigError(f"max_num_seqs {max_num_seqs} cannot be split over {num_shards}")
        if max_num_batched_tokens < num_shards:
            raise ConfigError(
                f"max_num_batched_tokens {max_num_batched_tokens} is less than one token for each "
                f"of {num_shards} data shards"
            )
        per_shard = max_num_seqs // num_shards
        self._shards = [
            Shard(i, pool, range(i * per_shard, (i + 1) * per_shard), page_size)
            for i, pool in enumerate(page_pools)
        ]
        self._page_size = page_size
        self._smallest_pool = min(pool.num_total for pool in page_pools)
        self._shard_budget = max_num_batched_tokens // num_shards
        self._max_model_len = max_model_len
        self._max_waiting = max_waiting
        self._policy = policy
        self._waiting = WaitingQueue()
        self._active: dict[int, Ranked] = {}  # by key: every unfinished request
        self._by_id: dict[str, Request] = {}
        self._just_preempted: set[int] = set()
        self._num_preemptions = 0

    # Requests come and go.

    def add(self, request: Request) -> None:
        """Queue a new request.

        Raises:
            QueueFull: `max_waiting` requests wait already.
            InvalidRequest: the id is in use, or the request could not be served even alone.
        """
        if request.request_id in self._by_id:
            raise InvalidRequest(f"request id {request.request_id!r} is already in use")
        self._require_servable(request)
        if len(self._waiting) >= self._max_waiting:
            raise QueueFull(f"{len(self._waiting)} requests are waiting; try again later")
        self._by_id[request.request_id] = request
        self._enqueue(request, request.arrival_time)

    def abort(self, request_id: str) -> bool:
        """End a request now and take back all it holds; tokens still on the device are dropped.

        Returns:
            Whether there was such an unfinished request.
        """
        request = self._by_id.get(request_id)
        if request is None:
            return False
        self._finish(request, FinishReason.ABORT)
        return True

    def _require_servable(self, request: Request) -> None:
        prompt_len = len(request.prompt_token_ids)
        if prompt_len < 1:
            raise InvalidRequest("the prompt has no tokens")
        if request.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, got {request.max_tokens}")
        if prompt_len > self._max_model_len - 1:
            raise InvalidRequest(
                f"the prompt has {prompt_len} tokens; at most {self._max_model_len - 1} leave room "
                f"for an answer in the context of {self._max_model_len}"
            )
        # The last token of an answer is never fed back, so it needs no KV.
        kv_tokens = min(prompt_len + request.max_tokens, self._max_model_len) - 1
        capacity = self._smallest_pool * self._page_size
        if kv_tokens > capacity:
            raise InvalidRequest(
                f"prompt and answer of up to {kv_tokens + 1} tokens do not fit the KV cache of "
                f"{capacity} tokens; shorten the prompt or lower max_tokens"
            )

    def _enqueue(self, request: Request, now: float) -> None:
        entry = Ranked(self._policy.priority(request, now), request.key, request)
        self._active[request.key] = entry
        request.state = RequestState.WAITING
        self._waiting.push(entry)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        entry = self._active.pop(request.key)
        del self._by_id[request.request_id]
        if request.state is RequestState.RUNNING:
            self._shards[request.shard].stop(entry)
        else:
            self._waiting.discard(request)
        request.num_pending_tokens = 0
        request.state = RequestState.FINISHED
        request.finish_reason = reason

    # One step.

    def plan(self, now: float) -> StepPlan | None:
        """Decide the next step and count it as launched.

        Args:
            now: the current time in seconds, on the clock of `Request.arrival_time`.

        Returns:
            The step, rows grouped by shard, or None when there is nothing to compute now (no
            work at all, or all of it waits for a commit).
        """
        self._just_preempted.clear()
        for shard in self._shards:
            shard.begin_step(self._shard_budget)
            self._serve_running(shard, now)
        self._admit()
        rows = tuple(row for shard in self._shards for row in shard.rows)
        return StepPlan(rows) if rows else None

    def _serve_running(self, shard: Shard, now: float) -> None:
        decodes: list[Request] = []
        prefills: list[Request] = []
        for entry in shard.running:
            request = entry.request
            if self._has_all_tokens(request):
                # It only waits for its commit; no later step reads its KV.
                shard.release_pages(request)
            elif request.num_tokens - request.num_computed_tokens == 1:
                decodes.append(request)
            else:
                prefills.append(request)
        for requests in (decodes, prefills):
            for request in requests:
                if shard.budget == 0:
                    break
                if request.state is RequestState.RUNNING:  # not preempted a moment ago
                    self._serve(shard, request, now)
        if len(self._waiting):
            still_running = (r for r in decodes + prefills if r.state is RequestState.RUNNING)
            shard.owed = sum(map(shard.pages_owed, still_running))

    def _serve(self, shard: Shard, request: Request, now: float) -> None:
        """Give a running request its row, at the cost of requests after it in policy order.

        Nobody is preempted for a request that comes later than all without a row: it sits
        out this step and keeps its pages until somebody before it wants them. The first in
        order thus always gets its row, or all the others have theirs: each plan makes progress.
        """
        wanted = min(request.num_tokens - request.num_computed_tokens, shard.budget)
        while (granted := shard.grow(request, wanted)) == 0:
            victim = shard.victim()
            if victim is None or victim.request is request:
                shard.is_short = True
                return
            self._preempt(shard, victim, now)
        shard.is_short |= granted < wanted
        shard.add_row(request, granted)

    def _preempt(self, shard: Shard, entry: Ranked, now: float) -> None:
        request = entry.request
        shard.stop(entry)
        request.num_computed_tokens = 0
        request.num_cached_tokens = 0
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._just_preempted.add(request.key)
        self._enqueue(request, now)

    def _admit(self) -> None:
        """Start waiting requests, strictly in policy order, so that none is overtaken for ever.

        Whoever starts must find pages for all its tokens, not only for its first chunk, beside
        what is owed to the running ones. Alone on a shard it always does (see `add`).
        """
        while (entry := self._waiting.peek()) is not None:
            request = entry.request
            # Recomputing a preempted request takes the values of its tokens, all of them.
            if request.num_pending_tokens or request.key in self._just_preempted:
                return
            shard = self._roomiest_shard(request)
            if shard is None:
                return
            self._waiting.pop()
            shard.start(entry)
            request.state = RequestState.RUNNING
            granted = shard.grow(request, min(request.num_tokens, shard.budget))
            shard.add_row(request, granted)
            shard.owed += shard.pages_owed(request)

    def _roomiest_shard(self, request: Request) -> Shard | None:
        needed = -(-request.num_tokens // self._page_size)
        fitting = (
            shard
            for shard in self._shards
            if shard.budget and shard.free_slots and not shard.is_short
            if shard.spare_pages >= needed
        )
        return max(fitting, key=lambda shard: shard.spare_pages, default=None)

    def _has_all_tokens(self, request: Request) -> bool:
        """Whether every token the request may have has at least been launched."""
        return (
            request.num_output_tokens >= request.max_tokens
            or request.num_tokens >= self._max_model_len
        )

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
        for row, token in zip(plan.rows, result.token_ids.tolist(), strict=True):
            entry = self._active.get(row.key)
            if entry is None or not row.samples:
                continue
            request = entry.request
            request.output_token_ids.append(token)
            request.num_pending_tokens -= 1
            if row.key in finished:
                self._finish(request, finished[row.key])
            elif not request.num_pending_tokens and self._has_all_tokens(request):
                raise ValueError(f"request {request.request_id!r} is over but not finished")

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
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._active)

    @property
    def num_preemptions(self) -> int:
        """Preemptions so far, over all requests."""
        return self._num_preemptions

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

    def get(self, request_id: str) -> Request | None:
        """The unfinished request of that id."""
        return self._by_id.get(request_id)

    def get_by_key(self, key: int) -> Request | None:
        """The unfinished request of that key (`StepRow.key`)."""
        entry = self._active.get(key)
        return entry.request if entry else None

    def check(self) -> None:
        """Verify all books; O(everything), for tests and for the idle engine.

        Raises:
            AssertionError: a slot or page is lost or owned twice, or a state is wrong.
        """
        for shard in self._shards:
            shard.check()
            for entry in shard.running:
                request = entry.request
                assert request.state is RequestState.RUNNING and request.key in self._active
                assert request.shard == shard.index and request not in self._waiting
                held = len(request.page_ids) * self._page_size
                assert held >= request.num_computed_tokens or self._has_all_tokens(request)
        requests = [entry.request for entry in self._active.values()]
        waiting = [request for request in requests if request in self._waiting]
        assert len(waiting) == len(self._waiting)
        assert len(waiting) + self.num_running == len(requests) == len(self._by_id)
        for request in waiting:
            assert request.state is RequestState.WAITING
            assert request.slot is None and not request.page_ids
            assert request.num_computed_tokens == 0
