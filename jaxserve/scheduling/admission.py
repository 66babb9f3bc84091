"""Who starts to run, and who makes room: from the waiting queue to slots and pages, and back."""

from collections.abc import Sequence

from jaxserve.core.request import Request, RequestState
from jaxserve.scheduling.counts import CacheCounts
from jaxserve.scheduling.policies import Policy
from jaxserve.scheduling.preemption import PreemptionCost
from jaxserve.scheduling.ranking import Ranked, Ranking
from jaxserve.scheduling.settings import SchedulerSettings
from jaxserve.scheduling.shard import Shard
from jaxserve.scheduling.waiting_queue import WaitingQueue

_REFRESHED_PER_STEP = 16  # waiting requests whose rank is asked for again, where it changes


class Admission:
    """Moves requests between waiting and running, as the policy says and the room allows.

    Args:
        shards: where requests run.
        policy: the order of service.
        settings: the mechanism's switches.
        page_size: tokens per page.

    Attributes:
        waiting: requests without a slot.
        ranking: the order of all.
        preemption: what becomes of a preempted request's KV.
        num_preemptions: so far.
        cache_counts: what starting requests found in the caches.
    """

    def __init__(
        self, shards: Sequence[Shard], policy: Policy, settings: SchedulerSettings, page_size: int
    ) -> None:
        self.ranking = Ranking(policy, settings.starvation_timeout)
        self.waiting = WaitingQueue(self.ranking)
        self.preemption = PreemptionCost(settings.preemption, settings.costs)
        self.num_preemptions = 0
        self.cache_counts = CacheCounts()
        self._shards = shards
        self._policy = policy
        self._slice_tokens = settings.slice_tokens
        self._page_size = page_size
        self._traits = policy.traits
        self._just_preempted: set[int] = set()
        self._given_up: list[Request] = []

    def begin_step(self, now: float) -> None:
        """Forget the last step, and look again at some of those that wait."""
        self._just_preempted.clear()
        if self._traits.refreshes:
            self.waiting.refresh(now, _REFRESHED_PER_STEP, self.look_up)

    def make_room(self, now: float) -> None:
        """Before any is served: stop requests whose turn is over, and start those that take it."""
        if not len(self.waiting):
            return
        if self._slice_tokens is not None:
            self._end_slices(self._slice_tokens, now)
        if self._traits.displaces:
            self._displace(now)

    def take_given_up(self) -> list[Request]:
        """Requests that were shed, and wait no more, since the last call."""
        given_up, self._given_up = self._given_up, []
        return given_up

    # Starting.

    def admit(self, now: float) -> None:
        """Start waiting requests, strictly in policy order, so that none is overtaken for ever.

        A request that starts must find pages for all its tokens, not only for its first chunk,
        beside what is owed to the running ones. Alone on a shard it always does (see `add`).
        """
        if not len(self.waiting) or not any(shard.free_slots for shard in self._shards):
            return
        for shard in self._shards:
            shard.owed = None  # serving the running ones has changed it
        while (entry := self._next(now)) is not None:
            shard = self._start(entry, now)
            if shard is None:
                return
            request = entry.request
            if request.fetch_ticket is None:
                wanted = min(request.num_tokens - request.num_computed_tokens, shard.budget)
                shard.add_row(request, shard.pages.grow(request, wanted), now)
            shard.owe(request)

    def _next(self, now: float) -> Ranked | None:
        """The first in line, if it can start at all; those that the policy gives up are not."""
        while (entry := self.waiting.peek(now)) is not None:
            request = entry.request
            # Recomputing a preempted request takes the values of its tokens, all of them.
            if request.num_pending_tokens or request.key in self._just_preempted:
                return None
            may_shed = self._traits.sheds and not request.num_output_tokens
            if not (may_shed and self._policy.sheds(request, now)):
                return entry
            self.waiting.discard(request)
            self._given_up.append(request)
        return None

    def _start(self, entry: Ranked, now: float) -> Shard | None:
        """Let a waiting request run on the shard that holds most of its tokens."""
        request = entry.request
        candidates = []
        for shard in self._shards:
            if shard.budget and shard.free_slots and not shard.is_short:
                found = shard.pages.find(request)
                num_found = len(found.shared) + len(found.stored)
                candidates.append((-num_found, -shard.spare_pages, shard.index, found))
        for _, _, index, found in sorted(candidates):
            shard = self._shards[index]
            if shard.start(entry, found, now):
                self.waiting.discard(request)
                request.state = RequestState.RUNNING
                if request.started_time is None:
                    request.started_time = now
                request.slice_start = request.num_output_tokens
                self.cache_counts.started(request, looked_up=shard.pages.looks_up(request))
                if request.fetch_ticket is None:
                    self.begin_computing(shard, request)
                return shard
        return None

    def begin_computing(self, shard: Shard, request: Request) -> None:
        """Let a request go on from what the caches held of it, all of which it has now."""
        shard.pages.drop_swapped(request)
        request.cached_estimate = request.num_computed_tokens
        if request.num_reused_tokens is None:
            request.num_reused_tokens = min(
                request.num_computed_tokens, len(request.prompt_token_ids)
            )

    def look_up(self, request: Request) -> None:
        """Estimate what a waiting request would find in the cache."""
        if request.wants_hidden:
            return
        most = max(len(shard.pool.match(request.page_keys)) for shard in self._shards)
        request.cached_estimate = most * self._page_size

    # Stopping.

    def preempt(self, shard: Shard, request: Request, now: float) -> None:
        """Take slot and pages from a running request, which goes on later."""
        if self.preemption.swaps(request.num_computed_tokens, len(request.page_ids)):
            shard.pages.swap_out(request)
        shard.stop(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._just_preempted.add(request.key)
        request.state = RequestState.WAITING
        self._policy.preempted(request, now)
        self.waiting.push(request, now)

    def _displace(self, now: float) -> None:
        """Let newcomers take the places of running requests that rank after them."""
        while (entry := self._next(now)) is not None:
            if (shard := self._start(entry, now)) is not None:
                shard.owe(entry.request)
                continue
            last = max(
                (rank for shard in self._shards if (rank := shard.last_idle()) is not None),
                default=None,
            )
            if last is None or not entry < last:
                return
            if last.tier == entry.tier and not self._policy.displaces(
                entry.request, last.request, now
            ):
                return
            self.preempt(self._shards[last.request.shard], last.request, now)

    def _end_slices(self, slice_tokens: int, now: float) -> None:
        """Let requests make room that have had their slice: slice-level scheduling (SLS).

        Not for those that would come after them again; and overdue requests have no slices.
        """
        for shard in self._shards:
            for entry in map(Ranked._make, reversed(shard.ranks[:])):
                first = self.waiting.peek(now)
                if first is None or shard.free_slots:
                    break
                request = entry.request
                if entry.tier == 0 or request.has_all_tokens:
                    continue
                used = request.num_output_tokens - request.slice_start
                if used >= slice_tokens and first < entry._replace(slices=entry.slices + 1):
                    request.num_slices += 1
                    self.preempt(shard, request, now)
