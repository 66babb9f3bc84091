"""`bench buckets` and `bench padding`: what they choose and what they report."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from jaxserve.bench.buckets import choose_buckets_from_histogram
from jaxserve.bench.padding import measure_padding
from jaxserve.bench.padding_time import PaddedStep, PaddingTime, representatives
from jaxserve.bench.settings import PaddingSpec
from jaxserve.bench.sides import Sides
from jaxserve.bench.workloads import WorkloadItem
from jaxserve.cli.bench_engine import buckets, padding
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.step_histogram import StepHistogram
from jaxserve.engine.engine import Engine
from jaxserve.runner.buckets import doubling_buckets, parse_buckets
from jaxserve.testing.fake_engine import fake_sync_engine


def histogram(num_shards: int = 1) -> StepHistogram:
    counted = StepHistogram(num_shards)
    counted.steps = Counter({(5, 5): 70, (6, 3): 20, (40, 2): 10, (1, 1): 1})
    return counted


def test_a_report_shows_both_sides_and_its_flags_are_valid():
    report = choose_buckets_from_histogram(histogram(), max_tokens=64, max_rows=16)
    tokens, rows = report.tokens, report.rows
    assert tokens.doubling.sizes == doubling_buckets(64) == (1, 8, 16, 32, 64)
    assert tokens.doubling.padding == pytest.approx(1 - 871 / (90 * 8 + 10 * 64 + 1))
    assert tokens.chosen.sizes == (1, 5, 6, 40, 64) and tokens.chosen.padding == 0
    assert tokens.chosen.cost == pytest.approx(871 / 101)
    costs = [best.cost for best in tokens.by_programs.values()]
    assert costs == sorted(costs, reverse=True) and list(tokens.by_programs) == [1, 2, 3, 4, 5]
    assert rows.chosen.cost <= rows.doubling.cost

    _, token_text, _, row_text = report.flags.split(" ")
    assert parse_buckets(token_text, option="", limit=64) == tokens.chosen.sizes
    assert parse_buckets(row_text, option="", limit=16) == rows.chosen.sizes
    text = str(report)
    assert re.search(r"chosen, 5 +0\.0 %", text) and text.endswith(report.flags)
    json.dumps(dataclasses.asdict(report))


def test_flags_are_of_all_shards_together():
    report = choose_buckets_from_histogram(
        histogram(num_shards=2), max_tokens=128, max_rows=32, num_programs=2, num_row_programs=1
    )
    assert report.tokens.chosen.sizes == (6, 64)
    assert report.flags == "--token-buckets 12,128 --row-buckets 32"
    with pytest.raises(ConfigError, match="do not divide by 2"):
        choose_buckets_from_histogram(histogram(num_shards=2), max_tokens=127, max_rows=32)


def test_seconds_decide_if_they_are_given():
    report = choose_buckets_from_histogram(
        histogram(), max_tokens=64, max_rows=16, num_programs=2, cost=lambda n: max(n, 32) / 1e3
    )
    assert report.tokens.chosen.sizes in ((6, 64), (40, 64))
    assert report.tokens.chosen.cost == pytest.approx((91 * 32 + 10 * 64) / 101e3) or (
        report.tokens.chosen.cost == pytest.approx(0.040)
    )
    assert "mean step (ms)" in str(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 39}, "a step of 40 was counted, the limit is 39"),
        ({"max_rows": 4}, "--max-num-seqs"),
        ({"num_programs": 0}, "at least one program"),
    ],
)
def test_wrong_limits_are_refused(options: dict[str, int], message: str):
    limits = {"max_tokens": 64, "max_rows": 16, "num_programs": 5, **options}
    with pytest.raises(ConfigError, match=message):
        choose_buckets_from_histogram(
            histogram(), max_tokens=limits["max_tokens"], max_rows=limits["max_rows"],
            num_programs=limits["num_programs"],
        )  # fmt: skip


# ---------------------------------------------------------------------------- padding


def trace(count: int) -> list[WorkloadItem]:
    rng = np.random.default_rng(0)
    return [
        WorkloadItem(0.1 * i, rng.integers(0, 250, int(rng.integers(8, 300)), np.int32), 40)
        for i in range(count)
    ]


def build(config: EngineConfig) -> Engine:
    tokens = parse_buckets(config.token_buckets, option="", limit=config.max_num_batched_tokens)
    built.append((config.page_size, tokens))
    return fake_sync_engine(
        page_size=config.page_size, num_pages=4096 // config.page_size, max_model_len=128,
        max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens,
        step_seconds=0,
    )  # fmt: skip


built: list[tuple[int, tuple[int, ...] | None]] = []


def test_padding_compares_both_sides_on_the_same_requests():
    built.clear()
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=32)
    spec = PaddingSpec(
        num_requests=12, num_calibration=60, length_scale=0.25, utilisation=0.9,
        page_sizes=(16, 4),
    )  # fmt: skip
    result = measure_padding(config, trace(72), spec, Sides(build=build))
    doubling, chosen, small = result.runs
    assert [run.name for run in result.runs] == ["doubling", "chosen", "chosen"]
    assert doubling.token_buckets == doubling_buckets(32)
    assert chosen.token_buckets == small.token_buckets == result.choice.tokens.chosen.sizes
    sizes = tuple(sorted({*(step.tokens for step in result.time.steps), 32}))
    assert built == [
        (16, None), (16, chosen.token_buckets), (4, chosen.token_buckets), (16, None), (16, sizes),
    ]  # fmt: skip
    assert sum(step.num_steps for step in result.time.steps) == doubling.num_steps
    assert all(step.tokens <= step.bucket in doubling_buckets(32) for step in result.time.steps)
    assert [run.page_size for run in result.runs] == [16, 16, 4]
    assert small.unused_kv < chosen.unused_kv < 0.5
    assert all(0 <= run.padding < 1 and run.mean_latency >= run.mean_ttft for run in result.runs)
    assert result.num_output_tokens == 12 * 10
    assert result.choice.flags in str(result)
    assert json.loads(json.dumps(dataclasses.asdict(result)))["runs"][2]["page_size"] == 4
    assert "all 24 answers identical" in str(result)


def test_sizes_that_stand_for_all_steps():
    assert representatives({7: 100}, 6) == {7: 100}
    assert representatives({1: 50, 2: 25, 3: 25, 0: 9}, 2) == {1: 50, 2: 50}
    assert representatives({3: 10, 5: 80, 9: 10}, 2) in ({5: 90, 9: 10}, {3: 10, 5: 90})


def test_padding_takes_the_time_that_exact_buckets_would_not():
    steps = (
        PaddedStep(tokens=17, bucket=32, num_steps=3, padded_seconds=0.02, exact_seconds=0.01),
        PaddedStep(tokens=32, bucket=32, num_steps=1, padded_seconds=0.02, exact_seconds=0.02),
    )
    text = str(PaddingTime(steps=steps, fraction=0.375))
    assert "37.5 %" in text and "17 in 32: 2.00, 32 in 32: 1.00" in text


def test_padding_refuses_what_it_cannot_use():
    with pytest.raises(ConfigError, match="two requests"):
        PaddingSpec(num_requests=1)
    with pytest.raises(ConfigError, match="page_sizes"):
        PaddingSpec(page_sizes=())
    with pytest.raises(ConfigError, match="utilisation"):
        PaddingSpec(utilisation=0)
    with pytest.raises(ConfigError, match="the trace has 72 requests"):
        measure_padding(EngineConfig(), trace(72), PaddingSpec(), Sides(build=build))


# ------------------------------------------------------------------------ the commands


@pytest.fixture
def azure(tmp_path: Path) -> str:
    lines = [f"2023-11-16 18:17:{i:02d}.5,{50 + 7 * i},{2 + i % 9}\n" for i in range(40)]
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(lines))
    return str(path)


def test_buckets_from_a_trace(azure: str, tmp_path: Path):
    out = tmp_path / "out.json"
    arguments = [
        "--trace", azure, "--step-ms", "20,1", "--num-programs", "3", "--output-json", str(out),
        "--length-scale", "0.5", "--utilisation", "0.5", "--max-num-batched-tokens", "64",
    ]  # fmt: skip
    result = CliRunner().invoke(buckets, arguments)
    assert result.exit_code == 0, result.output
    assert "A step takes 20.0 ms + 1.000 ms per token" in result.output
    fields = json.loads(out.read_text())
    assert fields["tokens"]["chosen"]["sizes"][-1] == 64
    assert len(fields["tokens"]["chosen"]["sizes"]) <= 3
    assert result.output.strip().endswith(fields["flags"])


def test_buckets_from_what_was_served(tmp_path: Path):
    histogram().save(tmp_path / "h.json")
    arguments = ["--histogram", str(tmp_path / "h.json"), "--max-num-batched-tokens", "64"]
    result = CliRunner().invoke(buckets, arguments)
    assert result.exit_code == 0, result.output
    assert "--token-buckets 1,5,6,40,64 --row-buckets" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --trace or --histogram"),
        (["--trace", "a", "--histogram", "b"], "either --trace or --histogram"),
        (["--histogram", "no.json"], "cannot read the step histogram"),
        (["--trace", "no.csv", "--step-ms", "1,1"], "cannot read the trace"),
        (["--trace", "no.csv", "--step-ms", "1"], "two numbers"),
        (["--trace", "no.csv", "--step-ms", "1,1", "--cost", "time"], "takes no --step-ms"),
    ],
)
def test_bad_options_end_with_a_message(arguments: list[str], message: str):
    result = CliRunner().invoke(buckets, arguments)
    assert result.exit_code in (1, 2) and message in result.output


def test_padding_checks_its_options_before_it_builds(azure: str):
    result = CliRunner().invoke(padding, ["--trace", azure, "--utilisation", "0"])
    assert result.exit_code == 2 and "utilisation must be positive" in result.output
