"""`bench spans`: engines that differ in their spans alone take turns, and what a span adds."""

import dataclasses

import pytest

from jaxserve.bench.settings import SpansSpec
from jaxserve.bench.sides import Sides
from jaxserve.bench.spans import SpansResult, measure_spans
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.engine.engine import Engine
from jaxserve.testing.fake_engine import fake_sync_engine


def test_engines_differ_in_their_spans_alone():
    configs: list[EngineConfig] = []

    def build(config: EngineConfig) -> Engine:
        configs.append(config)
        return fake_sync_engine(page_size=config.page_size, num_pages=40)

    spec = SpansSpec(spans=(4, 1), rows=(2,), context_len=6, rounds=3)
    result = measure_spans(EngineConfig(page_size=4), spec, Sides(build=build))
    assert [config.num_spans for config in configs] == [1, 4]
    assert len({dataclasses.replace(config, num_spans=None) for config in configs}) == 1
    assert {n: [*rows] for n, rows in result.step_seconds.items()} == {1: [2], 4: [2]}
    assert result.added_seconds[1] == {2: 0.0}


def test_the_table_says_what_one_span_adds():
    result = SpansResult(
        step_seconds={1: {8: 0.020}, 5: {8: 0.0211}}, added_seconds={1: {8: 0.0}, 5: {8: 0.001}}
    )
    *_, one, five = str(result).splitlines()
    assert one.split() == ["1", "20.00"]
    assert five.split() == ["5", "21.10", "0.250"]


def test_one_number_is_no_comparison():
    with pytest.raises(ConfigError, match="two numbers or more"):
        SpansSpec(spans=(3, 3))
