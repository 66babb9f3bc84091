"""Counters of service against the VTC paper's algorithm, kept the dumb way."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.errors import ConfigError
from jaxserve.core.request import Request
from jaxserve.scheduling.policies import PolicySettings
from jaxserve.scheduling.policies.vtc import VirtualTokenCounter
from jaxserve.scheduling.tenant_accounts import TenantAccounts
from tests.scheduling.policies.simulation import Simulation, compute, make_request


def arrive(
    accounts: TenantAccounts, tenant: str, prompt_len: int = 10, answer_len: int = 100
) -> Request:
    request = make_request(prompt_len, answer_len, tenant=tenant)
    accounts.open(request)
    return request


def serve(accounts: TenantAccounts, request: Request, num_tokens: int) -> None:
    compute(request, num_tokens, accounts.charge)


def test_prompt_tokens_cost_one_and_answer_tokens_two_over_the_weight() -> None:
    accounts = TenantAccounts({"gold": 4.0})
    for tenant, weight in (("gold", 4.0), ("other", 1.0)):
        request = arrive(accounts, tenant)
        before = accounts.counter(tenant)
        serve(accounts, request, 6)
        assert accounts.counter(tenant) == before + 6 / weight
        serve(accounts, request, 4)  # and the first token
        assert accounts.counter(tenant) == before + 12 / weight
        serve(accounts, request, 1)
        assert accounts.counter(tenant) == before + 14 / weight


def test_cached_tokens_and_tokens_computed_again_are_free() -> None:
    accounts = TenantAccounts({})
    request = arrive(accounts, "a")
    request.num_computed_tokens = request.cached_estimate = 4
    serve(accounts, request, 3)
    assert accounts.counter("a") == 3
    request.num_computed_tokens = request.cached_estimate = 0  # preempted, and nothing cached
    serve(accounts, request, 9)
    assert accounts.counter("a") == 3 + 2
    serve(accounts, request, 1)
    serve(accounts, request, 1)
    assert accounts.counter("a") == 3 + 3 + 2 * 2
    request.num_computed_tokens = 0
    serve(accounts, request, 12)
    assert accounts.counter("a") == 3 + 3 + 3 * 2


def test_idling_earns_no_credit() -> None:
    accounts = TenantAccounts({})
    for tenant in ("a", "b"):
        arrive(accounts, tenant)  # one more, which waits for ever
    serve(accounts, arrive(accounts, "a", 100), 100)
    serve(accounts, arrive(accounts, "b", 300), 300)
    arrive(accounts, "c")
    assert accounts.counter("c") == accounts.counter("a") == 102


def test_an_empty_queue_is_remembered_by_who_left_it_last() -> None:
    accounts = TenantAccounts({})
    request = arrive(accounts, "a", 100)
    serve(accounts, request, 100)
    accounts.close(request)
    assert not accounts._accounts  # it would come back to the same counter
    arrive(accounts, "b")
    assert accounts.counter("b") == 102


def test_a_tenant_ahead_of_the_rest_is_remembered_until_they_catch_up() -> None:
    accounts = TenantAccounts({})
    arrive(accounts, "a")  # one that keeps waiting
    running = arrive(accounts, "a", 1000)
    for _ in range(2):  # b comes and goes, served 100 + 2 each time
        serve(accounts, request := arrive(accounts, "b", 100), 100)
        accounts.close(request)
    for served in (100, 100, 10):
        accounts.close(arrive(accounts, "c"))  # whoever leaves is the occasion to look around
        assert accounts.counter("b") == 204 and accounts.counter("a") < 204
        serve(accounts, running, served)
    accounts.close(arrive(accounts, "c"))
    assert accounts._accounts.keys() == {"a"}


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_weights_must_be_positive(weight: float) -> None:
    with pytest.raises(ConfigError, match="tenant 'a'"):
        TenantAccounts({"a": weight})


class DumbCounters:
    """Algorithm 2 of the paper, with every tenant remembered and every minimum looked for."""

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        self.waiting: list[Request] = []
        self.last_left: str | None = None

    def join(self, request: Request) -> None:
        tenant, tenants = request.service.tenant, {r.service.tenant for r in self.waiting}
        counter = self.counters.setdefault(tenant, 0.0)
        if not tenants and self.last_left is not None:
            counter = max(counter, self.counters[self.last_left])
        elif tenants and tenant not in tenants:
            counter = max(counter, min(self.counters[t] for t in tenants))
        self.counters[tenant] = counter
        self.waiting.append(request)

    def leave(self, request: Request) -> None:
        if request in self.waiting:
            self.waiting.remove(request)
            tenant = request.service.tenant
            if all(r.service.tenant != tenant for r in self.waiting):
                self.last_left = tenant


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from("AASSSSPF"), st.integers(0, 7)), max_size=80))
def test_counters_are_those_of_the_paper_and_idle_tenants_are_forgotten(
    operations: list[tuple[str, int]],
) -> None:
    accounts, dumb = TenantAccounts({"t1": 2.0}), DumbCounters()
    unfinished: list[Request] = []
    for what, number in operations:
        if what == "A":
            request = arrive(accounts, f"t{number % 4}", prompt_len=3 + number)
            dumb.join(request)
            unfinished.append(request)
            continue
        if not unfinished:
            continue
        request = unfinished[number % len(unfinished)]
        tenant = request.service.tenant
        if what == "S":
            dumb.leave(request)
            tokens = min(1 + number, request.num_tokens - request.num_computed_tokens)
            weight = 2.0 if tenant == "t1" else 1.0
            prompt_len = len(request.prompt_token_ids)
            was = request.num_output_tokens, request.num_computed_tokens
            serve(accounts, request, tokens)
            if not request.num_preemptions:  # computes everything for the first time
                fresh = min(request.num_computed_tokens, prompt_len) - min(was[1], prompt_len)
                charge = fresh + 2 * (request.num_output_tokens - was[0])
                dumb.counters[tenant] += charge / weight
            else:
                request.num_preemptions = 1  # see "P"
                dumb.counters[tenant] += 2 * (request.num_output_tokens - was[0]) / weight
        elif what == "P" and request not in dumb.waiting:
            if request.num_computed_tokens < len(request.prompt_token_ids):
                continue  # so that what is computed again is all of the prompt
            request.num_computed_tokens = 0
            request.num_preemptions += 1
            accounts.queue(request)
            dumb.join(request)
        elif what == "F":
            dumb.leave(request)
            accounts.close(request)
            unfinished.remove(request)
        for waiting in dumb.waiting:
            tenant = waiting.service.tenant
            assert accounts.counter(tenant) == dumb.counters[tenant]
        _check_memory(accounts, dumb, unfinished)


def _check_memory(accounts: TenantAccounts, dumb: DumbCounters, unfinished: list[Request]) -> None:
    active = {r.service.tenant for r in unfinished}
    assert accounts._charges.keys() == {r.key for r in unfinished}
    assert active <= accounts._accounts.keys()
    for tenant in accounts._accounts.keys() - active:
        assert accounts.counter(tenant) == dumb.counters[str(tenant)]
    for tenant in dumb.counters.keys() - accounts._accounts.keys():
        assert dumb.counters[tenant] <= accounts._floor()  # it would be lifted beyond it anyway
    assert len(accounts._queue) <= 4 + len(accounts._accounts)
    assert len(accounts._idle) <= len(accounts._accounts)


def test_tenants_that_come_once_do_not_pile_up() -> None:
    policy = VirtualTokenCounter(PolicySettings())
    accounts = policy._accounts
    rng = random.Random(0)
    simulation = Simulation(policy, slots=4, budget=50)
    for number in range(1000):  # as many as can just be served, and some are aborted
        simulation.add(make_request(10, 3, tenant=f"once {number}", arrival=simulation.now))
        if simulation.waiting and rng.random() < 0.1:
            simulation.abort(rng.choice(simulation.waiting))
        if number % 20 == 0:
            simulation.add(make_request(30, 30, tenant="steady", arrival=simulation.now))
        simulation.step()
        unfinished = len(simulation.waiting) + len(simulation.running)
        assert len(accounts._accounts) <= unfinished + 50
        assert len(accounts._queue) <= unfinished + 50 and len(accounts._idle) <= 50


def test_the_rank_of_an_unknown_tenant_is_where_it_would_join() -> None:
    accounts = TenantAccounts({})
    serve(accounts, arrive(accounts, "a", 100), 100)
    arrive(accounts, "a")
    assert accounts.counter("nobody") == accounts.counter("a")
