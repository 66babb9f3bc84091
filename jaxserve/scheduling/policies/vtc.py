"""Virtual token counters: fairness between tenants."""

import heapq
from collections.abc import Hashable, Sequence

from jaxserve.core.errors import ConfigError
from jaxserve.core.request import Request
from jaxserve.scheduling.policies.base import Policy, PolicySettings, Priority

PROMPT_PRICE = 1.0  # w_p of the paper, per prompt token
ANSWER_PRICE = 2.0  # w_q, per answer token


class _Account:
    """What a tenant was served, in tokens weighted by price and by the tenant's share."""

    __slots__ = (
        "answer_price",
        "counter",
        "in_idle",
        "in_queue",
        "number",
        "prompt_price",
        "tenant",
        "unfinished",
        "waiting",
    )

    def __init__(self, tenant: str, weight: float, number: int) -> None:
        self.tenant = tenant
        self.number = number  # breaks ties in heaps
        self.prompt_price = PROMPT_PRICE / weight
        self.answer_price = ANSWER_PRICE / weight
        self.counter = 0.0
        self.waiting = 0  # requests
        self.unfinished = 0  # requests
        self.in_queue = self.in_idle = False  # whether it has an entry in that heap


class _Charge:
    """What a request has been charged for, in tokens."""

    __slots__ = ("account", "answer", "preemptions", "prompt", "waiting")

    def __init__(self, account: _Account, preemptions: int) -> None:
        self.account = account
        self.prompt = 0  # all prompt tokens before this one are paid, or were never computed
        self.answer = 0
        self.waiting = True
        self.preemptions = preemptions


class VirtualTokenCounter(Policy):
    """The tenant that was served least goes first; requests of one tenant go by arrival.

    From "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024). Each tenant has a
    counter of what it was served: w_p = 1 per prompt token and w_q = 2 per answer token, divided
    by its weight. While two tenants always have requests waiting, what they are served differs by
    at most 2 * max(w_p * longest prompt, w_q * tokens of a full batch). Work-conserving: if only
    one tenant has requests, it gets everything. A tenant that comes back from having none waiting
    is lifted to the smallest counter among those that have, or, if nobody has, to that of the one
    who last had: idling earns no credit.

    Charged is what was computed for a tenant, once, when it is planned:

    * Cached prompt tokens are free. The counter stands for what a tenant costs the others, and
      whoever first had the prefix computed has paid for it (Cao et al., 2025, "Locality-aware
      Fair Scheduling in LLM Serving", count likewise).
    * What is computed again after a preemption is free: the tenant did not ask for that, and the
      paper's service is what a client receives.

    The paper charges a whole prompt when it starts. By chunks, the tokens still to be charged
    belong to a running request and are at most those of a full batch, so the bound stands.

    A tenant with no unfinished request and a counter at or below the one that it would be lifted
    to is forgotten, for it would come back to exactly the same. The others are those who were
    served ahead of the rest a moment ago, at most by the bound: there are not many, and they are
    forgotten when the rest has caught up.

    Args:
        settings: the tenants' weights.

    Raises:
        ConfigError: a weight is not positive.
    """

    ages = False
    reranks = True  # with the group's rank

    def __init__(self, settings: PolicySettings) -> None:
        for tenant, weight in settings.tenant_weights.items():
            if not weight > 0:
                raise ConfigError(f"the weight of tenant {tenant!r} must be positive, got {weight}")
        self._weights = settings.tenant_weights
        self._accounts: dict[Hashable, _Account] = {}  # by tenant
        self._charges: dict[int, _Charge] = {}  # by Request.key
        self._num_accounts = 0
        # Heaps of accounts by counter. Counters only grow: an entry is brought up to date when it
        # comes to the top.
        self._queue: list[tuple[float, int, _Account]] = []  # those with waiting requests
        self._idle: list[tuple[float, int, _Account]] = []  # those without unfinished ones
        self._last_to_wait: _Account | None = None

    def priority(self, request: Request, now: float) -> Priority:
        """The arrival time, in seconds."""
        charge = self._charges[request.key]
        if charge.preemptions != request.num_preemptions:
            # Nothing else tells that the request is back in the queue.
            charge.preemptions = request.num_preemptions
            if not charge.waiting:
                charge.waiting = True
                self._join_queue(charge.account)
        return request.arrival_time

    def group(self, request: Request) -> str:
        """The tenant."""
        return request.service.tenant

    def group_priority(self, group: Hashable, now: float) -> float:
        """The tenant's counter, in weighted tokens."""
        account = self._accounts.get(group)
        return account.counter if account else self._floor()

    def priorities(self, requests: Sequence[Request], now: float) -> Sequence[Priority]:
        """Their arrival times; they run, so none of them is back in the queue."""
        return [request.arrival_time for request in requests]

    def group_priorities(self, requests: Sequence[Request], now: float) -> Sequence[float]:
        """Their tenants' counters."""
        charges = self._charges
        return [charges[request.key].account.counter for request in requests]

    def arrived(self, request: Request, now: float) -> None:
        """Queue a request; lift its tenant's counter if nothing of it was waiting."""
        tenant = request.service.tenant
        account = self._accounts.get(tenant)
        if account is None:
            weight = self._weights.get(tenant, 1.0)
            account = self._accounts[tenant] = _Account(tenant, weight, self._num_accounts)
            self._num_accounts += 1
        account.unfinished += 1
        self._charges[request.key] = _Charge(account, request.num_preemptions)
        self._join_queue(account)

    def served(self, served: Sequence[tuple[Request, int]], now: float) -> None:
        """Charge tenants for what is computed for the first time."""
        charges = self._charges
        for request, num_tokens in served:
            charge = charges[request.key]
            account = charge.account
            if charge.waiting:
                self._leave_queue(charge)
            prompt_len = len(request.prompt_token_ids)
            if charge.prompt < prompt_len:
                end = request.num_computed_tokens
                fresh = min(end, prompt_len) - max(end - num_tokens, charge.prompt)
                if fresh > 0:
                    account.counter += fresh * account.prompt_price
                    charge.prompt = min(end, prompt_len)
            answer = request.num_tokens - prompt_len
            if answer > charge.answer:
                account.counter += (answer - charge.answer) * account.answer_price
                charge.answer = answer

    def finished(self, request: Request) -> None:
        """Forget the request, and tenants that need not be remembered."""
        charge = self._charges.pop(request.key, None)
        if charge is None:
            return
        if charge.waiting:
            self._leave_queue(charge)
        account = charge.account
        account.unfinished -= 1
        if not account.unfinished:
            if not account.in_idle:
                account.in_idle = True
                heapq.heappush(self._idle, (account.counter, account.number, account))
            self._forget_tenants()

    def _join_queue(self, account: _Account) -> None:
        if not account.waiting:
            account.counter = max(account.counter, self._floor())
            if not account.in_queue:
                account.in_queue = True
                heapq.heappush(self._queue, (account.counter, account.number, account))
        account.waiting += 1

    def _leave_queue(self, charge: _Charge) -> None:
        charge.waiting = False
        charge.account.waiting -= 1
        if not charge.account.waiting:
            self._last_to_wait = charge.account

    def _floor(self) -> float:
        """The counter that a tenant is lifted to when it joins the queue. Never falls."""
        queue = self._queue
        while queue:
            counter, number, account = queue[0]
            if not account.waiting:
                account.in_queue = False
                heapq.heappop(queue)
            elif counter < account.counter:
                heapq.heapreplace(queue, (account.counter, number, account))
            else:
                return counter
        return self._last_to_wait.counter if self._last_to_wait else 0.0

    def _forget_tenants(self) -> None:
        floor = self._floor()
        while self._idle and self._idle[0][0] <= floor:
            _, number, account = heapq.heappop(self._idle)
            account.in_idle = False
            if account.unfinished:
                continue  # it is entered again when it has none
            if account.counter <= floor:
                del self._accounts[account.tenant]
            else:
                account.in_idle = True
                heapq.heappush(self._idle, (account.counter, number, account))
