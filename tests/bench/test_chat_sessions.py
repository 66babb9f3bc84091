"""Chats on a device that cannot hold them, in virtual time, with real tiers of tiny pages."""

from pathlib import Path
from typing import Any

import pytest

from jaxserve.bench.chat_sessions import (
    CHAT_SIDES,
    DEVICE,
    DISK,
    HOST,
    NO_CACHE,
    ChatResult,
    chat_configs,
    measure_chat,
)
from jaxserve.bench.settings import ChatSpec
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from tests.bench.virtual import VirtualTime

SPEC = ChatSpec(num_sessions=4, num_turns=6, message_len=9, answer_len=5)
MIB = 2**-10
CONFIG = EngineConfig(page_size=4, overlap=False, host_cache_memory=MIB, disk_cache_memory=8 * MIB)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> ChatResult:
    return measure_chat(CONFIG, SPEC, tmp_path_factory.mktemp("kv"), VirtualTime().sides())


def test_answers_are_the_same_on_every_side(result: ChatResult) -> None:
    assert result.differing_answers == {DEVICE: 0, HOST: 0, DISK: 0}
    assert result.num_answers == 24


def test_without_a_cache_everything_is_computed(result: ChatResult) -> None:
    side = result.sides[NO_CACHE]
    offered = 4 * sum(14 * turn + 9 for turn in range(6))
    assert side.prefill_tokens_computed == side.prefill_tokens_offered == offered
    assert side.ttft_reduction == 0 and side.prefill_speedup == 1
    # One prompt at a time, in one step.
    assert side.mean_ttft == pytest.approx(1 + offered / 24 / 100)
    assert side.prefill_throughput == pytest.approx(offered / (24 * side.mean_ttft))


def test_what_a_tier_holds_is_not_computed_again(result: ChatResult) -> None:
    turns = result.turns
    for number in range(1, 6):
        # The answer's last token was never computed, and of the page it is in nothing is kept.
        fresh = 4 * (9 + 1 + (14 * number - 1) % 4)
        assert turns[HOST][number].prefill_tokens_computed <= fresh
        if number >= SPEC.restart_turn:
            assert turns[DISK][number].prefill_tokens_computed <= fresh
    assert turns[DEVICE][5].prefill_tokens_computed > 4 * 20  # no room for four sessions
    assert result.sides[HOST].ttft_reduction > result.sides[DEVICE].ttft_reduction


def test_only_turns_after_the_restart_count(result: ChatResult) -> None:
    side = result.sides[DISK]
    assert side.first_turn_counted == 4
    assert side.prefill_tokens_offered == 4 * sum(14 * turn + 9 for turn in (3, 4, 5))
    base = [turn.mean_ttft for turn in result.turns[NO_CACHE][3:]]
    mine = [turn.mean_ttft for turn in result.turns[DISK][3:]]
    assert side.ttft_reduction == pytest.approx(1 - sum(mine) / sum(base))
    assert result.restart_seconds > 0


def test_the_tables_show_all(result: ChatResult) -> None:
    text = str(result)
    assert all(f"\n{side} (turns" in text for side in CHAT_SIDES)
    assert "CachedAttention" in text and "87%" in text and "7.8x" in text
    assert "restarted before turn 4" in text and "host: all 24 answers identical" in text


def test_the_sides_differ_in_their_tiers_only(tmp_path: Path) -> None:
    sides = chat_configs(CONFIG, SPEC, tmp_path)
    assert tuple(sides) == CHAT_SIDES
    assert [c.prefix_cache for c in sides.values()] == [False, True, True, True]
    assert [c.host_cache_memory for c in sides.values()] == [0, 0, MIB, MIB]
    assert [c.disk_cache_memory for c in sides.values()] == [0, 0, 0, 8 * MIB]
    assert {c.num_pages for c in sides.values()} == {2 * 21}


@pytest.mark.parametrize(
    ("fields", "message"),
    [(dict(num_sessions=2), "3 sessions"), (dict(num_turns=1), "2 turns"),
     (dict(answer_len=0), "answer_len")],
)  # fmt: skip
def test_bad_specifications_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChatSpec(**fields)


def test_tiers_must_have_room(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="host_cache_memory"):
        measure_chat(EngineConfig(), SPEC, tmp_path, VirtualTime().sides())
