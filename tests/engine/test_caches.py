"""The prefix cache and the tiers below it, on a real model: what is reused, and the same tokens."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.core.service_params import ServiceParams
from jaxserve.engine.engine import Engine
from tests.engine.harness import assert_idle, greedy, maker, prompts, run, tokens

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiles")]

PAGE_SIZE = 4
TURNS = 5


@pytest.fixture(scope="module")
def make(
    tiny_model: Callable[..., Path], program_cache_dir: Path
) -> Iterator[Callable[..., Engine]]:
    limits = {
        "page_size": PAGE_SIZE, "max_num_batched_tokens": 16, "num_pages": 48,
        "compilation_cache_dir": str(program_cache_dir),
    }  # fmt: skip
    with maker(tiny_model("llama"), **limits) as make:
        yield make


@pytest.fixture(scope="module")
def plain(make: Callable[..., Engine]) -> Engine:
    return make(prefix_cache=False)


def chats(num_chats: int) -> list[list[int]]:
    return [[7 + i] * 3 + list(range(20, 30)) for i in range(num_chats)]


def converse(engine: Engine, num_chats: int = 4) -> tuple[list[list[int]], int]:
    """Chats that take turns; every prompt is all that was said before, and a little more.

    Returns:
        Every chat's tokens, and how many prompt tokens were computed.
    """
    histories = chats(num_chats)
    before = engine.load()
    for turn in range(TURNS):
        for history in histories:
            history += [40 + turn, 41, 42]
            [answer] = run(engine, [(history, greedy(6))])
            history += answer.token_ids
    after = engine.load()
    computed = after.num_prompt_tokens - before.num_prompt_tokens
    computed -= after.num_device_hit_tokens - before.num_device_hit_tokens
    computed -= after.num_store_hit_tokens - before.num_store_hit_tokens
    return histories, computed


def test_a_shared_prefix_is_computed_once(make: Callable[..., Engine], plain: Engine) -> None:
    system = list(range(100, 141))  # ten pages and a token
    requests = [(system + p, greedy(8)) for p in prompts(6, 10, seed=3)]
    engine = make()
    assert tokens(run(engine, requests)) == tokens(run(plain, requests))
    # The first comes alone on the budget; all the others find its pages.
    assert engine.load().num_device_hit_tokens >= 5 * 40
    assert plain.load().num_device_hit_tokens == 0


def test_a_prompt_computed_before_takes_one_token_only(make: Callable[..., Engine]) -> None:
    engine = make()
    for length in (15, 16, 17):  # a page not quite full, full, and just begun
        prompt = list(range(50, 50 + length))
        first = run(engine, [(prompt, greedy(5))])
        before = engine.load()
        assert run(engine, [(prompt, greedy(5))]) == first
        after = engine.load()
        assert after.num_device_hit_tokens - before.num_device_hit_tokens == length - 1


def test_what_was_cached_is_reported(make: Callable[..., Engine]) -> None:
    engine = make()
    prompt = list(range(60, 80))
    cached = []
    for _ in range(2):
        engine.add("r", prompt, greedy(3))
        deltas = []
        while engine.has_work:
            deltas += engine.step(0.0)
        cached.append({delta.num_cached_tokens for delta in deltas})
    assert cached == [{0}, {19}]


def test_tenants_share_only_by_a_common_salt(make: Callable[..., Engine]) -> None:
    engine = make()
    prompt = list(range(60, 80))

    def hits(*, tenant: str = "", cache_salt: str = "") -> int:
        before = engine.load().num_device_hit_tokens
        service = ServiceParams(tenant=tenant, cache_salt=cache_salt)
        engine.add("r", prompt, greedy(2), service)
        while engine.has_work:
            engine.step(0.0)
        return engine.load().num_device_hit_tokens - before

    assert hits(tenant="a") == 0 and hits(tenant="a") == 19
    assert hits(tenant="b") == 0, "somebody can find out what another tenant has asked"
    assert hits(tenant="b", cache_salt="a") == 0, "a tenant's name is no salt"
    assert hits(tenant="a", cache_salt="common") == 0 and hits(cache_salt="common") == 19


def test_conversations_survive_a_pool_that_is_too_small(
    make: Callable[..., Engine], plain: Engine
) -> None:
    expected, offered = converse(plain)
    tiered, computed = converse(make(num_pages=20, host_cache_memory=0.01))
    assert tiered == expected
    assert computed < offered / 3
    # Without the host's memory hardly anything is left from one turn to the next.
    small = make(num_pages=20)
    assert converse(small)[0] == expected and converse(small)[1] > 2 * computed


def test_conversations_survive_a_restart(
    make: Callable[..., Engine], plain: Engine, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"disk_cache_memory": 0.01, "disk_cache_dir": str(tmp_path)}
    expected, _ = converse(plain)
    first = make(num_pages=20, host_cache_memory=0.001, **options)
    assert converse(first)[0] == expected
    with pytest.raises(ConfigError, match="in use by process"):
        make(**options)  # two engines on one directory
    first.close()
    again = make(**options)
    histories, computed = converse(again)
    assert histories == expected
    assert again.load().num_store_hit_tokens > 0
    assert computed < 10 * 4 * TURNS, "a page's rest and a question per turn, hardly more"
    again.close()

    [file] = tmp_path.glob("*.pages")
    contents = bytearray(file.read_bytes())
    for place in range(5000, len(contents), 1500):
        contents[place] ^= 0xFF
    file.write_bytes(bytes(contents))
    damaged = make(**options)
    assert converse(damaged)[0] == expected, "a damaged page was served"


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_swapping_gives_the_same_tokens(
    make: Callable[..., Engine], plain: Engine, prefix_cache: bool
) -> None:
    requests = [(p, greedy(24)) for p in prompts(8, 12, seed=5)]
    engine = make(
        num_pages=20, preemption="swap", host_cache_memory=0.01, prefix_cache=prefix_cache
    )
    assert tokens(run(engine, requests)) == tokens(run(plain, requests))
    load = engine.load()
    assert load.num_preemptions > 0 and load.num_restored_tokens > 0
    assert_idle(engine)


def test_an_abort_while_pages_are_loaded_loses_nothing(make: Callable[..., Engine]) -> None:
    engine = make(num_pages=20, host_cache_memory=0.01)
    prompt = list(range(60, 90))
    run(engine, [(prompt, greedy(2))])
    for start in (0, 40, 80):  # push it out of the device
        run(engine, [(list(range(start, start + 39)), greedy(2))])
    engine.add("late", prompt, greedy(8))
    engine.step(0.0)
    assert engine._scheduler.num_fetches == 1
    engine.abort("late")
    engine._scheduler.check()
    [after] = run(engine, [(prompt, greedy(8))])
    assert_idle(engine)
    engine.close()
    assert not engine._scheduler.num_fetches
    assert len(after.token_ids) == 8
