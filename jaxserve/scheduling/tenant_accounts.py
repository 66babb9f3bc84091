"""What tenants were served, and which of them must be remembered."""

import heapq
from collections.abc import Hashable, Mapping, Sequence

from jaxserve.core.errors import ConfigError
from jaxserve.core.request import Request

PROMPT_PRICE = 1.0  # w_p of the VTC paper, per prompt token
ANSWER_PRICE = 2.0  # w_q, per answer token


class Account:
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

    __slots__ = ("account", "answer", "prompt", "waiting")

    def __init__(self, account: Account) -> None:
        self.account = account
        self.prompt = 0  # all prompt tokens before this one are paid, or were never computed
        self.answer = 0
        self.waiting = True


class TenantAccounts:
    """A counter of service per tenant, as the policy vtc compares them.

    Charged is what was computed for a tenant, once, when it is planned:

    * Cached prompt tokens are free. The counter stands for what a tenant costs the others, and
      the tenant that first had the prefix computed has paid for it (Cao et al., 2025,
      "Locality-aware Fair Scheduling in LLM Serving", count so too).
    * What is computed again after a preemption is free: the tenant did not ask for that, and the
      paper's service is what a client receives.

    The paper charges a whole prompt when it starts. By chunks, the tokens still to be charged
    belong to a running request and are at most those of a full batch, so its bound stands.

    A tenant that comes back from having no request waiting is lifted to the smallest counter
    among those that have, or, if none has, to that of the one that last had.

    A tenant with no unfinished request and a counter at or below the one that it would be lifted
    to is forgotten, for it would come back to exactly that one. The others are those who were
    served ahead of the rest a moment ago, at most by the bound: there are not many, and they are
    forgotten when the rest has caught up.

    Args:
        weights: each tenant's share; tenants not named have 1.

    Raises:
        ConfigError: a weight is not positive.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        for tenant, weight in weights.items():
            if not weight > 0:
                raise ConfigError(f"the weight of tenant {tenant!r} must be positive, got {weight}")
        self._weights = weights
        self._accounts: dict[Hashable, Account] = {}  # by tenant
        self._charges: dict[int, _Charge] = {}  # by Request.key
        self._num_accounts = 0
        # Heaps of accounts by counter. Counters only grow: an entry is brought up to date when it
        # comes to the top.
        self._queue: list[tuple[float, int, Account]] = []  # those with waiting requests
        self._idle: list[tuple[float, int, Account]] = []  # those without unfinished ones
        self._last_to_wait: Account | None = None

    def counter(self, tenant: Hashable) -> float:
        """What a tenant was served, in weighted tokens; of one not known, where it would begin."""
        account = self._accounts.get(tenant)
        return account.counter if account else self._floor()

    def counters(self, requests: Sequence[Request]) -> list[float]:
        """The counter of each unfinished request's tenant."""
        charges = self._charges
        return [charges[request.key].account.counter for request in requests]

    def open(self, request: Request) -> None:
        """A new request waits; lift its tenant's counter if no other of the tenant did."""
        tenant = request.service.tenant
        account = self._accounts.get(tenant)
        if account is None:
            weight = self._weights.get(tenant, 1.0)
            account = self._accounts[tenant] = Account(tenant, weight, self._num_accounts)
            self._num_accounts += 1
        account.unfinished += 1
        self._charges[request.key] = _Charge(account)
        self._join_queue(account)

    def queue(self, request: Request) -> None:
        """A request that ran waits again."""
        charge = self._charges[request.key]
        if not charge.waiting:
            charge.waiting = True
            self._join_queue(charge.account)

    def charge(self, served: Sequence[tuple[Request, int]]) -> None:
        """Charge tenants for what is computed for the first time; see `Policy.served`."""
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

    def close(self, request: Request) -> None:
        """A request has ended: forget it, and tenants that need not be remembered."""
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

    def _join_queue(self, account: Account) -> None:
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
