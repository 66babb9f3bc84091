"""What tenants may ask for: requests and tokens by the minute, requests at a time."""

import dataclasses
import math
import time
from collections.abc import Callable

from jaxserve.core.errors import RateLimited
from jaxserve.core.options import POSITIVE, check_number

# How soon to try again when all that a tenant may run at a time is running: nobody knows.
_BUSY_RETRY_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TenantLimits:
    """A tenant's share; None is no limit.

    Attributes:
        requests_per_minute: generations started. n answers or prompts count n times.
        tokens_per_minute: tokens of prompts and answers together.
        max_concurrent_requests: generations waiting or running at the same time.

    Raises:
        ConfigError: a limit is not positive.
    """

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_concurrent_requests: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                check_number(field.name, value, POSITIVE)

    @property
    def any(self) -> bool:
        """Whether there is any limit."""
        return any(value is not None for value in dataclasses.astuple(self))

    def or_else(self, other: "TenantLimits") -> "TenantLimits":
        """These limits, and the other's where these say nothing."""
        own = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return dataclasses.replace(other, **own)


class TokenBucket:
    """Fills evenly up to a minute's worth; may be overdrawn.

    Args:
        now: seconds; it begins full.
    """

    def __init__(self, now: float) -> None:
        self._level = math.inf  # cut to a minute's worth when first looked at
        self._at = now

    def shortage(self, per_minute: float, needed: float, now: float) -> float:
        """Seconds until the bucket holds `needed`; 0 if it does."""
        gained = max(0.0, now - self._at) * per_minute / 60
        self._level = min(per_minute, self._level + gained)
        self._at = now
        # More than it can ever hold is granted when it is full.
        return max(0.0, min(needed, per_minute) - self._level) * 60 / per_minute

    def take(self, amount: float) -> None:
        """Take from it, below nothing if need be."""
        self._level -= amount


class TenantAccount:
    """What one tenant has used.

    Args:
        tenant: its name.
        now: seconds.
    """

    def __init__(self, tenant: str, now: float) -> None:
        self._tenant = tenant
        self._requests = TokenBucket(now)
        self._tokens = TokenBucket(now)
        self.num_running = 0

    def enter(self, limits: TenantLimits, num_prompt_tokens: int, now: float) -> None:
        """Let one more request in, and take what it costs so far.

        Raises:
            RateLimited: the tenant has used up its share. Nothing was taken then.
        """
        most = limits.max_concurrent_requests
        if most is not None and self.num_running >= most:
            raise self._refusal(f"{most} requests at a time", _BUSY_RETRY_SECONDS)
        waits: list[tuple[str, float]] = []
        if limits.requests_per_minute is not None:
            wait = self._requests.shortage(limits.requests_per_minute, 1.0, now)
            waits.append((f"{limits.requests_per_minute:g} requests per minute", wait))
        if limits.tokens_per_minute is not None:
            # Any credit will do: how long the answer gets is not known, and a debt is paid back.
            wait = self._tokens.shortage(limits.tokens_per_minute, 1.0, now)
            waits.append((f"{limits.tokens_per_minute:g} tokens per minute", wait))
        what, wait = max(waits, key=lambda item: item[1], default=("", 0.0))
        if wait > 0:
            raise self._refusal(what, wait)
        self._requests.take(1.0)
        self._tokens.take(num_prompt_tokens)
        self.num_running += 1

    def spend(self, num_tokens: int) -> None:
        """Take tokens of an answer."""
        self._tokens.take(num_tokens)

    def leave(self) -> None:
        """A request that was let in has ended, however it did."""
        self.num_running -= 1

    def _refusal(self, share: str, retry_after: float) -> RateLimited:
        return RateLimited(
            f"tenant {self._tenant!r} has used up its {share}; try again in {retry_after:.1f} s",
            retry_after=retry_after,
        )


class TenantAccounts:
    """The accounts of all tenants: `engine.accounts.Accounts`, by limits.

    Args:
        limits_of: a tenant's limits as of now, by its name.
        now: seconds, on any monotonic clock.
    """

    def __init__(
        self, limits_of: Callable[[str], TenantLimits], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits_of = limits_of
        self._now = now
        self._accounts: dict[str, TenantAccount] = {}

    def enter(self, tenant: str, num_prompt_tokens: int) -> TenantAccount | None:
        """Let a request in; None if its tenant has no limits.

        Raises:
            RateLimited: the tenant has used up its share.
        """
        limits = self._limits_of(tenant)
        if not limits.any:
            return None
        now = self._now()
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = TenantAccount(tenant, now)
        account.enter(limits, num_prompt_tokens, now)
        return account
