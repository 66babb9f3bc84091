"""How long steps take: a line or a table through measured ones, and attention's share."""

import json
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from jaxserve.bench.sides import Sides
from jaxserve.bench.step_time import (
    LinearCost,
    StepsResult,
    TabledCost,
    busy_processes,
    measure_contexts,
    measure_steps,
)
from jaxserve.cli.bench import bench
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.engine import build
from jaxserve.engine.engine import Engine
from jaxserve.testing.fake_engine import fake_sync_engine
from jaxserve.testing.fake_executor import FakeExecutor


def test_a_line_is_found_again():
    line = LinearCost.fit({n: 0.03 + 0.002 * n for n in (1, 8, 16, 64)})
    assert (line.base, line.per_token) == (pytest.approx(0.03), pytest.approx(0.002))
    assert line(100) == pytest.approx(0.23)
    flat = LinearCost.fit({1: 2.0, 100: 1.9})
    assert flat.per_token == 0 and flat(1) > 0
    for base, slope in ((-1, 2), (1, -2), (0, 0), (float("nan"), 1)):
        with pytest.raises(ConfigError, match="must take time"):
            LinearCost(base, slope)


def test_a_table_never_falls():
    cost = TabledCost({16: 3.0, 1: 1.0, 8: 5.0, 32: 9.0})
    assert [cost(n) for n in (1, 8, 16, 24, 32, 99)] == [1, 5, 5, 7, 9, 9]


def test_measured_steps_fill_their_bucket():
    executor = FakeExecutor(page_size=4)
    sizes = (1, 3, 7)
    seconds = measure_steps(
        executor, sizes, max_rows=3, page_size=4, num_pages=100, context_len=6, repeats=2
    )
    assert list(seconds) == list(sizes) and min(seconds.values()) > 0
    plans = executor.plans[::3]  # one to warm up and two timed, of each
    assert [plan.num_tokens for plan in plans] == list(sizes)
    assert [[row.num_tokens for row in plan.rows] for plan in plans] == [[1], [1, 1, 1], [3, 2, 2]]
    assert {row.end for plan in plans for row in plan.rows} == {6}


def test_contexts_take_turns():
    executor = FakeExecutor(page_size=4)
    engine = fake_sync_engine(page_size=4, num_pages=40, executor=executor)
    seconds = measure_contexts(engine, [2, 3], [1, 6], 2, Sides())
    assert {rows: list(mine) for rows, mine in seconds.items()} == {2: [1, 6], 3: [1, 6]}
    timed = executor.plans[1::2]  # each after one that is not
    shapes = [(len(plan.rows), {row.end for row in plan.rows}) for plan in timed]
    assert shapes == [(n, {end}) for n in (2, 3) for end in (1, 6, 6, 1)]
    assert {row.num_tokens for plan in executor.plans for row in plan.rows} == {1}


def test_shares_are_over_the_step_that_attends_to_nothing_else():
    text = str(StepsResult(step_seconds={1: {1: 0.02, 512: 0.02}, 32: {1: 0.06, 512: 0.08}}))
    header, _, *rows = (line.split() for line in text.splitlines())
    assert header == ["rows", "ms", "at", "context", "1", "at", "512", "attention"]
    assert rows == [["1", "20.0", "20.0", "0%"], ["32", "60.0", "80.0", "25%"]]


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    configs: list[EngineConfig] = []

    def make(config: EngineConfig, progress: bool) -> Engine:
        configs.append(config)
        assert config.num_pages is not None
        return fake_sync_engine(page_size=config.page_size, num_pages=config.num_pages)

    monkeypatch.setattr(build, "build_sync_engine", make)
    out = tmp_path / "o.json"
    arguments = [
        "steps", "m", "--rows", "3,1", "--context-lens", "9", "--page-size", "4",
        "--rounds", "1", "--beside-busy", "1", "--kv-cache-dtype", "bfloat16",
        "--output-json", str(out),
    ]  # fmt: skip
    result = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (config,) = configs
    assert (config.token_buckets, config.num_pages, config.max_model_len) == ("1,3", 9, 9)
    assert config.kv_cache_dtype == "bfloat16"
    saved = json.loads(out.read_text())["step_seconds"]
    assert {rows: list(mine) for rows, mine in saved.items()} == {"1": ["1", "9"], "3": ["1", "9"]}
    for bad, message in (
        (["--rows", "0"], "--rows must be positive"),
        (["--context-lens", "1"], "must have one above 1"),
        (["--context-lens", "0,5"], "--context-lens must be positive"),
        (["--beside-busy", "-1"], "--beside-busy must not be negative"),
    ):
        result = CliRunner().invoke(bench, ["steps", "m", *bad])
        assert result.exit_code == 2 and message in result.output


def test_busy_processes_end_with_what_they_are_beside():
    with pytest.raises(KeyboardInterrupt), busy_processes(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
        raise KeyboardInterrupt
    assert {process.returncode for process in processes} == {-signal.SIGKILL}
