"""The commands that compare engines, as typed, on engines that take no time."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jaxserve.cli import bench
from jaxserve.core.config import EngineConfig
from jaxserve.engine.engine import Engine
from tests.bench.virtual import VirtualTime, virtual_engine

BUILT: list[EngineConfig] = []


def build(config: EngineConfig, progress: bool) -> Engine:
    assert not progress
    BUILT.append(config)
    return virtual_engine(VirtualTime(), config)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a command and returns what it printed and wrote."""
    monkeypatch.setattr("jaxserve.engine.build.build_sync_engine", build)
    BUILT.clear()

    def run(*arguments: str) -> tuple[str, dict[str, Any]]:
        path = tmp_path / "results" / "r.json"
        command = [*arguments, "--disable-tqdm", "--output-json", str(path)]
        result = CliRunner().invoke(bench.bench, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output, json.loads(path.read_text())

    return run


def test_prefix_cache(run: Any, tmp_path: Path) -> None:
    text, saved = run(
        "prefix-cache", "m", "--num-requests", "4", "--prefix-len", "40", "--suffix-len", "3",
        "--output-len", "2", "--rounds", "1", "--num-sessions", "3", "--num-turns", "2",
        "--message-len", "9", "--answer-len", "4", "--page-size", "4", "--host-cache-memory",
        "0.001", "--disk-cache-memory", "0.01", "--disk-cache-dir", str(tmp_path / "disk"),
    )  # fmt: skip
    assert "4 requests, all at once, a system prompt of 40 tokens" in text
    assert "3 sessions of 2 turns, 9 new tokens and 4 answered per turn" in text
    assert saved["shared"]["sides"]["no cache"]["prefill_tokens_computed"] == 4 * 43
    assert saved["chat"]["differing_answers"] == {"device": 0, "host": 0, "disk, restarted": 0}
    assert not list((tmp_path / "disk").iterdir())  # the tier's files are gone


def test_one_part_of_prefix_cache(run: Any) -> None:
    text, saved = run("prefix-cache", "m", "--part", "shared", "--num-requests", "2",
                      "--rounds", "1", "--page-size", "32", "--request-rate", "1e6")  # fmt: skip
    assert "2 requests, 1e+06 per second, a system prompt of 512 tokens" in text
    assert saved["chat"] is None and saved["shared"]["num_answers"] == 2


def test_chunked_prefill(run: Any) -> None:
    text, saved = run(
        "chunked-prefill", "m", "--num-streams", "2", "--prompt-len", "60", "--budgets", "16,32",
        "--rounds", "1", "--tpot-ms", "1000",
    )  # fmt: skip
    assert "2 streams decode, a prompt of 60 tokens arrives" in text
    assert list(saved["sides"]) == ["budget 16", "budget 32", "tpot", "prefill first"]
    assert saved["tpot_ms"] == 1000
    assert "smaller by" in text


def test_fairness(run: Any) -> None:
    text, saved = run("fairness", "m", "--light-requests", "5", "--ratio", "4", "--input-len",
                      "6", "--output-len", "3", "--rounds", "1", "--max-num-seqs", "2")  # fmt: skip
    assert "two tenants, 5 and 20 requests of 6 tokens in and 3 out" in text
    assert saved["bound"] == 2 * 2 * 2 * 9 and saved["num_answers"] == 25
    assert {config.policy for config in BUILT} == {"vtc", "fcfs"}


def test_policies(run: Any) -> None:
    text, saved = run(
        "policies", "m", "--random-weights", "--num-requests", "12", "--num-lessons", "0",
        "--max-output-len", "6", "--sides", "fcfs,srtf:oracle,mlfq", "--max-num-seqs", "2",
        "--ttft-target", "100", "--tpot-target", "100", "--long-share", "0.5",
    )  # fmt: skip
    assert "12 requests at" in text and "targets: TTFT 100 s (interactive half) or 1000 s" in text
    assert saved["output_lens"] == [6] * 12
    assert [side["slo_attainment"] for side in saved["sides"].values()] == [1, 1, 1]
    assert [config.policy for config in BUILT] == ["fcfs", "fcfs", "srtf", "mlfq", "fcfs"]
