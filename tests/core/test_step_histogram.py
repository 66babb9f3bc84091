"""Counting steps, and reading the counts back."""

import json
from pathlib import Path

import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.step import PageCopy, StepPlan, StepRow
from jaxserve.core.step_histogram import FORMAT, StepHistogram


def plan(*rows: tuple[int, int, bool]) -> StepPlan:
    """Rows of (shard, tokens, samples)."""
    return StepPlan(
        tuple(
            StepRow(
                key=i, slot=i, shard=shard, start=0, num_tokens=tokens, token_ids=(1,) * tokens,
                page_ids=(i,), samples=samples, params=SamplingParams(), seed=0,
            )
            for i, (shard, tokens, samples) in enumerate(rows)
        )
    )  # fmt: skip


def test_counts_are_of_the_fullest_shard(tmp_path: Path):
    one, two = StepHistogram(), StepHistogram(num_shards=2)
    for _ in range(3):
        one.add(plan((0, 1, True), (0, 9, False)))
    one.add(plan((0, 10, True)))
    one.add(StepPlan((), copies=(PageCopy(0, 1, 2),)))
    assert one.steps == {(10, 1): 4} and one.num_steps == 4
    one.add(plan((0, 4, False)))
    assert one.tokens() == {10: 4, 4: 1} and one.sampled() == {1: 4, 0: 1}

    two.add(plan((0, 1, True), (1, 5, False), (0, 2, True)))
    assert two.steps == {(5, 2): 1}
    for histogram in (one, two):
        histogram.save(tmp_path / "new" / "h.json")
        loaded = StepHistogram.load(tmp_path / "new" / "h.json")
        assert loaded.steps == histogram.steps and loaded.num_shards == histogram.num_shards


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "not a step histogram"),
        ({}, "it has no 'format'"),
        ({"format": "x"}, "its format is 'x'"),
        ({"format": FORMAT, "num_shards": 1}, "tokens_sampled_count"),
        ({"format": FORMAT, "num_shards": 0, "tokens_sampled_count": []}, "at least one data"),
        ({"format": FORMAT, "num_shards": 1, "tokens_sampled_count": [[1, 2, 3]]}, "no step"),
        ({"format": FORMAT, "num_shards": 1, "tokens_sampled_count": [[1.5, 1, 3]]}, "1.5 is not"),
        ({"format": FORMAT, "num_shards": 1, "tokens_sampled_count": [[1, 1]]}, "unpack"),
    ],
)
def test_other_files_are_refused(fields: object, message: str, tmp_path: Path):
    path = tmp_path / "h.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=message) as error:
        StepHistogram.load(path)
    assert "h.json" in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read"):
        StepHistogram.load(tmp_path / "none.json")
