"""Gaps of streams in virtual time, where a step's length is known."""

import dataclasses
from typing import Any

import pytest

from jaxserve.bench import settings
from jaxserve.bench.chunked_prefill import (
    PREFILL_FIRST,
    TPOT,
    ChunkedPrefillResult,
    measure_chunked_prefill,
    side_configs,
)
from jaxserve.bench.settings import ChunkedPrefillSpec
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError, JaxserveError
from tests.bench.virtual import VirtualTime

SPEC = ChunkedPrefillSpec(
    num_streams=4, stream_prompt_len=6, prompt_len=200, steady_tokens=5, answer_len=3,
    budgets=(20, 100), rounds=2,
)  # fmt: skip
CONFIG = EngineConfig(page_size=4, overlap=False)


def measure(spec: ChunkedPrefillSpec) -> ChunkedPrefillResult:
    return measure_chunked_prefill(CONFIG, spec, VirtualTime().sides())


@pytest.fixture(scope="module")
def result() -> ChunkedPrefillResult:
    return measure(SPEC)


def test_gaps_are_those_of_the_steps(result: ChunkedPrefillResult) -> None:
    sides = result.sides
    assert list(sides) == ["budget 20", "budget 100", TPOT, PREFILL_FIRST]
    for side in sides.values():
        assert side.steady_gap == pytest.approx(1.04)  # a decode of four
    # Four tokens of every step are the streams'.
    assert sides["budget 20"].largest_gap == pytest.approx(1.2)
    assert sides["budget 20"].ttft == pytest.approx(12 * 1.2 + 1.12)
    assert sides["budget 100"].largest_gap == pytest.approx(2.0)
    assert sides["budget 100"].mean_gap == pytest.approx((2 * 2.0 + 1.12) / 3)
    assert sides["budget 100"].ttft == pytest.approx(2 * 2.0 + 1.12)
    # Two steps of the whole budget, and then the streams are back.
    assert sides[PREFILL_FIRST].ttft == pytest.approx(2 * 2.0)
    assert sides[PREFILL_FIRST].largest_gap == pytest.approx(2 * 2.0 + 1.05)
    assert sides[PREFILL_FIRST].worst_gap == sides[PREFILL_FIRST].largest_gap


def test_answers_are_the_same_and_the_table_says_so(result: ChunkedPrefillResult) -> None:
    assert result.num_answers == 3 * 5 and set(result.differing_answers.values()) == {0}
    text = str(result)
    assert "all 45 answers identical" in text
    assert "budget 20" in text and PREFILL_FIRST in text
    # In virtual time a steady step takes 1.04 s.
    assert result.tpot_ms == pytest.approx(3 * 1040) and "tpot 3120 ms" in text


def test_the_sides_differ_in_nothing_else() -> None:
    sides = side_configs(CONFIG, SPEC)
    assert [side.max_num_batched_tokens for side in sides.values()] == [20, 100, 100, 100]
    assert [side.token_budget for side in sides.values()] == ["fixed", "fixed", "tpot", "fixed"]
    assert [side.prefill_first for side in sides.values()] == [False, False, False, True]
    assert {side.num_pages for side in sides.values()} == {4 * 15 + 51}
    assert not any(side.prefix_cache for side in sides.values())


def test_streams_that_end_too_early_spoil_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the scheduler to give a prompt less beside the streams than it promises."""
    monkeypatch.setattr(settings, "SMALLEST_CHUNK", 16)
    with pytest.raises(JaxserveError, match="raise --tpot-ms"):
        measure(dataclasses.replace(SPEC, tpot_ms=1e-6, prompt_len=600))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(budgets=()), "budgets must not be empty"),
        (dict(budgets=(64, 15)), "at least 16"),
        (dict(rounds=0), "rounds"),
        (dict(prompt_len=-5), "prompt_len"),
    ],
)
def test_bad_specifications_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChunkedPrefillSpec(**fields)
