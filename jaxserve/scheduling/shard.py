"""One data shard's share of the scheduler's state: its pages, slots and running requests."""

from bisect import bisect_left
from collections.abc import Iterator

from jaxserve.core.request import Request, RequestState
from jaxserve.core.step import StepRow
from jaxserve.scheduling.ranking import Rank, Ranked, Ranking
from jaxserve.scheduling.request_pages import Found, RequestPages


class Shard:
    """What runs on one part of the mesh's data axis, and the step being planned for it.

    Attributes:
        pages: gives requests their pages.
        running: requests that hold a slot here, in policy order.
        ranks: theirs, in the same order.
        rows: rows planned for the current step.
        budget: tokens the current step may still take here.
        owed: pages that the running requests will soon ask for; admission leaves them alone. None:
            not counted, and only counted when a request could start.
        is_short: a running request went without all the pages it wanted in this step.
    """

    def __init__(
        self,
        index: int,
        pages: RequestPages,
        slots: range,
        page_size: int,
        admission: str,
        probe_every: int,
    ) -> None:
        self.index = index
        self.pages = pages
        self.pool = pages.pool
        self.slots = slots
        self.page_size = page_size
        self.running: list[Request] = []
        self.ranks: list[Rank] = []
        self.free_slots = list(reversed(slots))
        self.rows: list[StepRow] = []
        self.budget = 0
        self.owed: int | None = None
        self.is_short = False
        self._admission = admission
        self._probe_every = probe_every
        self._settled: set[int] = set()  # keys: has a row, or started, in the current step

    def begin_step(self, budget: int, ranking: Ranking, now: float) -> None:
        """Forget the last step; the next may take `budget` tokens."""
        self.rows = []
        self.budget = budget
        self.owed = None
        self.is_short = False
        self._settled.clear()
        self.pool.begin_step()
        if ranking.is_dynamic:
            ranks = ranking.rerank(self.running, now)
            if ranks is not None:
                self.ranks = ranks
                self.running = [rank[-1] for rank in ranks]

    # -- room -----------------------------------------------------------------------------

    def pages_wanted(self, request: Request) -> int:
        """Pages that a request is to find before it starts, as the option `admission` says."""
        num_tokens = request.num_tokens
        if self._admission == "max":
            num_tokens = len(request.prompt_token_ids) + request.max_tokens - 1
        elif self._admission == "predicted" and request.predicted_len is not None:
            final = len(request.prompt_token_ids) + min(request.predicted_len, request.max_tokens)
            num_tokens = max(num_tokens, int(final) - 1)
        return -(-num_tokens // self.page_size)

    def pages_owed(self, request: Request) -> int:
        """Pages to leave a running request: those it wanted at first, and one to grow into.

        Without that one a newcomer would be preempted after a few steps. A request that holds
        all the pages it can ever fill, or has all its tokens, is owed none.
        """
        if request.has_all_tokens:
            return 0
        held = len(request.page_ids)
        # The last token of an answer is never fed back, so it needs no KV.
        most = -(-(len(request.prompt_token_ids) + request.max_tokens - 1) // self.page_size)
        return min(max(0, self.pages_wanted(request) - held) + 1, most - held)

    def _count_owed(self) -> int:
        """`pages_owed` of all that run.

        Hundreds may run: so the usual kind of admission goes without calls.
        """
        if self._admission != "current":
            return sum(map(self.pages_owed, self.running))
        size, owed = self.page_size, 0
        for request in self.running:
            num_tokens, most_tokens = request.num_tokens, request.max_num_tokens
            if num_tokens < most_tokens:
                held = len(request.page_ids)
                missing = (num_tokens - 1) // size + 2 - held  # and one to grow into
                free_to_fill = (most_tokens - 2) // size + 1 - held
                if missing < 1:
                    missing = 1
                owed += missing if missing < free_to_fill else free_to_fill
        return owed

    def owe(self, request: Request) -> None:
        """Count what is owed to a request that has started since the others were counted."""
        assert self.owed is not None
        self.owed += self.pages_owed(request)

    @property
    def spare_pages(self) -> int:
        """Pages that neither are in use nor will soon be wanted by a running request."""
        if self.owed is None:
            self.owed = self._count_owed()
        return self.pool.num_available - self.owed

    # -- requests come and go -------------------------------------------------------------

    def start(self, entry: Ranked, found: Found, now: float) -> bool:
        """Give a request a slot and what the caches hold of it, if there is room for the rest.

        Returns:
            Whether it runs here from now on.
        """
        request = entry.request
        self.pool.share(found.shared)
        if self.spare_pages < self.pages_wanted(request) - len(found.shared):
            self.pool.free(found.shared)
            return False
        request.slot = self.free_slots.pop()
        request.shard = self.index
        place = bisect_left(self.ranks, entry)
        self.ranks.insert(place, entry)
        self.running.insert(place, request)
        self.pages.adopt(request, found, now)
        # It keeps what it got until the next step: copies into its pages come after saves.
        self._settled.add(request.key)
        return True

    def stop(self, request: Request) -> None:
        """Take slot and pages from a request that was running here.

        Launched steps may still read and write the pages and the slot. That is safe: the device
        runs steps in order, so the next owner can only touch them in a later step.
        """
        if self.owed is not None:
            self.owed -= self.pages_owed(request)
        self.pages.release(request)
        assert request.slot is not None
        self.free_slots.append(request.slot)
        request.slot = None
        place = self.running.index(request)
        del self.running[place], self.ranks[place]

    def victim(self) -> Request | None:
        """The last request in policy order that could give its pages to others in this step."""
        for request in reversed(self.running):
            is_idle = request.key not in self._settled and request.fetch_ticket is None
            if is_idle and request.page_ids:
                return request
        return None

    def last_idle(self) -> Ranked | None:
        """The last in policy order of those that may be stopped in this step.

        A request that fetches pages cannot give them up, and one that only waits for its last
        token would gain nothing by making room.
        """
        for rank, request in zip(reversed(self.ranks), reversed(self.running), strict=True):
            is_idle = request.key not in self._settled and request.fetch_ticket is None
            if is_idle and not request.has_all_tokens:
                return Ranked(*rank)
        return None

    # -- rows -----------------------------------------------------------------------------

    def work(self) -> tuple[list[Request], list[Request]]:
        """Who wants a row: those with one more token to compute, and those with several."""
        decodes, prefills = [], []
        for request in self.running:
            num_tokens = request.num_tokens
            if request.fetch_ticket is not None:
                continue
            if num_tokens >= request.max_num_tokens:
                # It only waits for its commit; no later step reads its KV.
                self.pages.release(request)
            elif num_tokens - request.num_computed_tokens == 1:
                decodes.append(request)
            else:
                prefills.append(request)
        return decodes, prefills

    def add_row(self, request: Request, num_tokens: int, now: float) -> None:
        """Plan the request's next tokens, whose pages it holds, and advance its counters.

        The counters move at planning, not at commit: launched counts as computed, and a token
        that the step will sample counts as pending, so the next step can be planned (and
        launched) before this one is collected.
        """
        start = request.num_computed_tokens
        end = start + num_tokens
        samples = end == request.num_tokens
        num_pages = -(-end // self.page_size)
        probe = self._probe_every
        assert request.slot is not None
        self.rows.append(
            StepRow(
                key=request.key,
                slot=request.slot,
                shard=self.index,
                start=start,
                num_tokens=num_tokens,
                # Without the value of a pending token: that one is in the slot, on the device.
                token_ids=tuple(request.known_tokens(start, end)),
                page_ids=request.page_ids[:num_pages],
                samples=samples,
                params=request.params,
                seed=request.seed,
                probe=samples and probe > 0 and request.num_output_tokens % probe == 0,
                late=samples and request.params.sampled_late,
                wants_hidden=request.wants_hidden and start < len(request.prompt_token_ids),
            )
        )
        request.num_computed_tokens = end
        if samples:
            request.num_pending_tokens += 1
            request.num_tokens += 1
            request.last_progress = now
        self.budget -= num_tokens
        self._settled.add(request.key)
        if end // self.page_size > request.num_published_pages:
            self.pages.publish(request)

    def add_decodes(self, requests: Iterator[Request], now: float) -> Request | None:
        """Plan one more token of each answer, up to a request that takes more than that.

        Nearly all rows of a busy server are of this kind, and hundreds are made every step: so
        this does without what they never need, and without calls.

        Args:
            requests: of this shard, with one token to compute each; left at where this ended.
                Those preempted meanwhile get nothing.
            now: seconds.

        Returns:
            The first request whose page is not there, or that has no answer yet, without a row;
            None if there was none before the requests or the budget came to an end.
        """
        rows, shard, size, probe = self.rows, self.index, self.page_size, self._probe_every
        settle, make, running = self._settled.add, tuple.__new__, RequestState.RUNNING
        most_rows = len(rows) + self.budget
        for request in requests:
            if len(rows) == most_rows:
                break
            if request.state is not running:
                continue
            key, start, params = request.key, request.num_computed_tokens, request.params
            page_ids, answer = request.page_ids, request.output_token_ids
            if len(page_ids) != start // size + 1 or not answer:
                self.budget = most_rows - len(rows)
                return request
            end, pending = start + 1, request.num_pending_tokens
            row = (
                key, request.slot, shard, start, 1, () if pending else (answer[-1],), page_ids,
                True, params, request.seed, probe > 0 and request.num_output_tokens % probe == 0,
                params.sampled_late, False,
            )  # fmt: skip
            rows.append(make(StepRow, row))
            request.num_computed_tokens = end
            request.num_pending_tokens = pending + 1
            request.num_tokens += 1
            request.last_progress = now
            settle(key)
            if end // size > request.num_published_pages:
                self.pages.publish(request)
        self.budget = most_rows - len(rows)
        return None

    # -- books ----------------------------------------------------------------------------

    def check(self, abandoned: list[int]) -> None:
        """Verify that slots are owned once, and pages by those who may; O(pages), for tests.

        Args:
            abandoned: pages that are being filled for a request that has ended.

        Raises:
            AssertionError: they are not.
        """
        self.pool.check()
        requests = self.running
        assert self.ranks == sorted(self.ranks), "running requests out of order"
        assert [rank[-1] for rank in self.ranks] == requests
        slots = sorted([r.slot for r in requests if r.slot is not None] + self.free_slots)
        assert slots == list(self.slots), f"slots of shard {self.index}: {slots}"
        private = [page for r in requests for page in r.page_ids[r.num_published_pages :]]
        private += abandoned
        shared = {page for r in requests for page in r.page_ids[: r.num_published_pages]}
        assert len(set(private)) == len(private), "a page that is not shared has two owners"
        assert not shared & set(private), "a page is written while others read it"
        for request in requests:
            written = request.num_published_pages * self.page_size
            assert written <= request.num_computed_tokens or request.fetch_ticket is not None
        used = len(shared | set(private))
        assert used == self.pool.num_used, (
            f"{self.pool.num_used} pages in use, running requests hold {used}"
        )
