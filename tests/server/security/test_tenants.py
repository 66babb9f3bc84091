"""Token buckets and concurrency, on a clock of the test's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.errors import ConfigError, RateLimited
from jaxserve.server.security.tenants import TenantAccount, TenantAccounts, TenantLimits


class Bank:
    """Accounts with the same limits for everybody, and their clock."""

    def __init__(self, **limits: float) -> None:
        self.now = 100.0
        self.limits = TenantLimits(**limits)  # type: ignore[arg-type]
        self.accounts = TenantAccounts(lambda tenant: self.limits, lambda: self.now)

    def enter(self, tenant: str = "acme", num_prompt_tokens: int = 1) -> TenantAccount:
        account = self.accounts.enter(tenant, num_prompt_tokens)
        assert account is not None
        return account


def test_a_minutes_requests_at_once_then_one_by_one() -> None:
    bank = Bank(requests_per_minute=6)
    for _ in range(6):
        bank.enter()
    with pytest.raises(RateLimited, match="6 requests per minute") as caught:
        bank.enter()
    assert caught.value.retry_after == pytest.approx(10)
    bank.enter("globex")  # has an account of its own
    bank.now += 9.9
    with pytest.raises(RateLimited):
        bank.enter()
    bank.now += 0.2
    bank.enter()


def test_tokens_of_prompts_and_answers_count_together_and_debts_are_paid_back() -> None:
    bank = Bank(tokens_per_minute=60)
    account = bank.enter(num_prompt_tokens=50)
    account.spend(70)  # 60 more than there were
    with pytest.raises(RateLimited, match="60 tokens per minute") as caught:
        bank.enter()
    assert caught.value.retry_after == pytest.approx(61)
    bank.now += 61.5
    bank.enter(num_prompt_tokens=1000)  # more than it can ever hold is a debt too
    bank.now += 600
    with pytest.raises(RateLimited):
        bank.enter()


def test_so_many_at_a_time() -> None:
    bank = Bank(max_concurrent_requests=2)
    first, _ = bank.enter(), bank.enter()
    with pytest.raises(RateLimited, match="2 requests at a time") as caught:
        bank.enter()
    assert caught.value.retry_after
    first.leave()
    bank.enter()


def test_a_refused_request_costs_nothing() -> None:
    bank = Bank(requests_per_minute=60, tokens_per_minute=60, max_concurrent_requests=1)
    account = bank.enter(num_prompt_tokens=60)
    account.leave()
    for _ in range(100):
        with pytest.raises(RateLimited):
            bank.enter(num_prompt_tokens=1000)
    bank.now += 1.1
    bank.enter(num_prompt_tokens=1)


def test_changed_limits_count_at_once() -> None:
    bank = Bank(requests_per_minute=1)
    bank.enter()
    with pytest.raises(RateLimited):
        bank.enter()
    bank.limits = TenantLimits(requests_per_minute=6000)
    bank.now += 0.1
    bank.enter()
    bank.limits = TenantLimits()
    assert bank.accounts.enter("acme", 1) is None


@given(
    limit=st.integers(1, 50),
    calls=st.lists(
        st.tuples(st.floats(0, 30), st.integers(0, 200), st.integers(0, 200)), max_size=40
    ),
)
def test_no_tenant_gets_more_than_its_share(
    limit: int, calls: list[tuple[float, int, int]]
) -> None:
    """A minute's worth at once and the rate from then on; a token debt shuts the door."""
    bank = Bank(requests_per_minute=limit, tokens_per_minute=60 * limit)
    start, used, num_entered = bank.now, 0, 0
    for wait, prompt, answer in calls:
        bank.now += wait
        try:
            account = bank.enter(num_prompt_tokens=prompt)
        except RateLimited as error:
            assert error.retry_after and error.retry_after > 0
            continue
        minutes = (bank.now - start) / 60 + 1
        assert num_entered + 1 <= minutes * limit + 1e-6
        assert used <= minutes * 60 * limit + 1e-6
        account.spend(answer)
        account.leave()
        num_entered += 1
        used += prompt + answer


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), 10**400])
def test_impossible_limits(value: float) -> None:
    for field in ("requests_per_minute", "tokens_per_minute", "max_concurrent_requests"):
        with pytest.raises(ConfigError, match=field):
            TenantLimits(**{field: value})  # type: ignore[arg-type]
