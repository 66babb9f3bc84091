"""Shared prompts in virtual time: what is computed, and what that saves."""

import dataclasses
from typing import Any

import pytest

from jaxserve.bench.prefix_cache import CACHE, NO_CACHE, SharedResult, measure_shared
from jaxserve.bench.settings import SharedSpec
from jaxserve.core.config import EngineConfig
from jaxserve.testing.fake_executor import FakeModel
from tests.bench.virtual import VirtualTime, virtual_engine

SPEC = SharedSpec(num_requests=8, prefix_len=64, suffix_len=8, output_len=5, rounds=2)
CONFIG = EngineConfig(page_size=4, max_num_seqs=8, max_num_batched_tokens=64, overlap=False)


def measure(spec: SharedSpec) -> SharedResult:
    return measure_shared(CONFIG, spec, VirtualTime().sides(model=FakeModel(vocab_size=256)))


@pytest.fixture(scope="module")
def result() -> SharedResult:
    return measure(SPEC)


def test_a_shared_prompt_is_computed_once_per_round(result: SharedResult) -> None:
    old, new = result.sides[NO_CACHE], result.sides[CACHE]
    assert old.prefill_tokens_offered == new.prefill_tokens_offered == 2 * 8 * 72
    assert old.prefill_tokens_computed == 2 * 8 * 72
    assert new.prefill_tokens_computed == 2 * (64 + 8 * 8)
    assert result.num_answers == 16 and result.differing_answers == 0
    # Without: 8 * 72 tokens in steps of 64, and four decodes of 8 rows; with: 2 steps of prefill.
    assert old.seconds / 2 == pytest.approx(9 + 4 + (8 * 72 + 8 * 4) / 100, rel=0.15)
    assert new.seconds / 2 == pytest.approx(2 + 4 + (64 + 8 * 8 + 8 * 4) / 100, rel=0.15)
    assert result.ttft_reduction == pytest.approx(1 - new.mean_ttft / old.mean_ttft)
    assert result.ttft_reduction > 0.5 and result.speedup > 1.5


def test_requests_may_come_at_a_rate() -> None:
    slow = measure(dataclasses.replace(SPEC, request_rate=1e-5))
    side = slow.sides[NO_CACHE]
    assert side.seconds > 2 * 600_000
    # Nobody waits for anybody: two steps of 72 tokens in all.
    assert side.mean_ttft == pytest.approx(2.72) == side.p99_ttft


def test_wrong_answers_are_noticed_and_shown() -> None:
    time = VirtualTime()

    def build(config: EngineConfig) -> Any:
        vocabulary = 256 if config.prefix_cache else 255  # the two sides are different models
        return virtual_engine(time, config, model=FakeModel(vocab_size=vocabulary))

    result = measure_shared(CONFIG, SPEC, time.sides(build))
    assert result.differing_answers == 16
    assert "16 of 16 answers DIFFER" in str(result)


def test_the_table_has_both_sides(result: SharedResult) -> None:
    text = str(result)
    assert "256 of 1152" in text and "1152 of 1152" in text
    assert "all 16 answers identical" in text
