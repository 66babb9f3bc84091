"""One data shard's share of the scheduler's state: its pages, slots and running requests."""

from bisect import bisect_left, insort

from jaxserve.cache.page_pool import PagePool
from jaxserve.core.request import Request
from jaxserve.core.step import StepRow
from jaxserve.scheduling.waiting_queue import Ranked


class Shard:
    """What runs on one part of the mesh's data axis, and the step being planned for it.

    Attributes:
        running: requests that hold a slot here, in policy order.
        rows: rows planned for the current step.
        budget: tokens the current step may still take here.
        owed: pages that the running requests will soon ask for; admission leaves them alone.
        is_short: a running request went without all the pages it wanted in this step.
    """

    def __init__(self, index: int, pool: PagePool, slots: range, page_size: int) -> None:
        self.index = index
        self.pool = pool
        self.slots = slots
        self.page_size = page_size
        self.running: list[Ranked] = []
        self.free_slots = list(reversed(slots))
        self._planned: set[int] = set()
        self.begin_step(0)

    def begin_step(self, budget: int) -> None:
        """Forget the last step; the next may take `budget` tokens."""
        self.rows: list[StepRow] = []
        self.budget = budget
        self.owed = 0
        self.is_short = False
        self._planned.clear()

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold so many tokens of one request."""
        return -(-num_tokens // self.page_size)

    def pages_missing(self, request: Request) -> int:
        """Pages the request still needs for the tokens it has so far."""
        return self.pages_for(request.num_tokens) - len(request.page_ids)

    def pages_owed(self, request: Request) -> int:
        """Pages to leave a running request: for the rest of its tokens, and one to grow into.

        Without that one a newcomer would be preempted after a few steps. A request that holds
        all the pages it can ever fill is owed none.
        """
        # The last token of an answer is never fed back, so it needs no KV.
        most = self.pages_for(len(request.prompt_token_ids) + request.max_tokens - 1)
        return min(max(0, self.pages_missing(request)) + 1, most - len(request.page_ids))

    @property
    def spare_pages(self) -> int:
        """Pages that neither are in use nor will soon be wanted by a running request."""
        return self.pool.num_available - self.owed

    def start(self, entry: Ranked) -> None:
        """Give a request a slot; it runs here from now on."""
        request = entry.request
        request.slot = self.free_slots.pop()
        request.shard = self.index
        insort(self.running, entry)

    def stop(self, entry: Ranked) -> None:
        """Take slot and pages from a request that was running here.

        Launched steps may still read and write the pages and the slot. That is safe: the device
        runs steps in order, so whoever gets them next can only touch them in a later step.
        """
        request = entry.request
        self.release_pages(request)
        assert request.slot is not None
        self.free_slots.append(request.slot)
        request.slot = None
        del self.running[bisect_left(self.running, entry)]

    def release_pages(self, request: Request) -> None:
        """Take a request's pages; it keeps its slot."""
        if request.page_ids:
            self.pool.free(request.page_ids)
            request.page_ids = []

    def grow(self, request: Request, num_tokens: int) -> int:
        """Give a request pages for its next tokens, for as many of them as there are pages.

        Returns:
            How many of the `num_tokens` tokens now have a place, possibly 0.
        """
        computed, held = request.num_computed_tokens, len(request.page_ids)
        missing = self.pages_for(computed + num_tokens) - held
        if missing > 0:
            pages = self.pool.allocate(min(missing, self.pool.num_available))
            request.page_ids += pages or ()
        return min(num_tokens, len(request.page_ids) * self.page_size - computed)

    def victim(self) -> Ranked | None:
        """The last request in policy order that holds pages and has no row in this step."""
        for entry in reversed(self.running):
            if entry.request.page_ids and entry.key not in self._planned:
                return entry
        return None

    def add_row(self, request: Request, num_tokens: int) -> None:
        """Plan the request's next tokens, whose pages it holds, and advance its counters.

        The counters move at planning, not at commit: launched counts as computed, and a token
        that the step will sample counts as pending, so the next step can be planned (and
        launched) before this one is collected.
        """
        assert request.slot is not None
        start = request.num_computed_tokens
        end = start + num_tokens
        samples = end == request.num_tokens
        self.rows.append(
            StepRow(
                key=request.key,
                slot=request.slot,
                shard=self.index,
                start=start,
                num_tokens=num_tokens,
                # Without the value of a pending token: that one is in the slot, on the device.
                token_ids=tuple(request.known_tokens(start, end)),
                page_ids=tuple(request.page_ids),
                samples=samples,
                params=request.params,
                seed=request.seed,
            )
        )
        request.num_computed_tokens = end
        if samples:
            request.num_pending_tokens += 1
        self.budget -= num_tokens
        self._planned.add(request.key)

    def check(self) -> None:
        """Verify that slots and pages are each owned once; O(pages), for tests.

        Raises:
            AssertionError: they are not.
        """
        self.pool.check()
        requests = [entry.request for entry in self.running]
        assert self.running == sorted(self.running), "running requests out of policy order"
        slots = sorted([r.slot for r in requests if r.slot is not None] + self.free_slots)
        assert slots == list(self.slots), f"slots of shard {self.index}: {slots}"
        pages = [page for request in requests for page in request.page_ids]
        assert len(set(pages)) == len(pages), "a page has two owners"
        assert len(pages) == self.pool.num_used, (
            f"{self.pool.num_used} pages in use, running requests own {len(pages)}"
        )
