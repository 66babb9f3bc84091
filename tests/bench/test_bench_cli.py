"""The `jaxserve bench` commands, as typed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jaxserve.cli import bench


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(bench.bench, list(arguments))


def test_every_command_has_help_without_heavy_imports() -> None:
    program = (
        "import sys; from click.testing import CliRunner; from jaxserve.cli.bench import bench\n"
        "for name in bench.commands:\n"
        "    assert CliRunner().invoke(bench, [name, '--help']).exit_code == 0, name\n"
        "heavy = {'jax', 'numpy', 'grpc', 'tqdm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert sorted(bench.bench.commands) == [
        "buckets", "chunked-prefill", "fairness", "frontend", "grammars", "host-cost", "latency",
        "padding", "peers", "policies", "predictor", "prefix-cache", "quality", "serve", "spans",
        "startup", "steps", "throughput",
    ]  # fmt: skip


NO_SERVER = ("serve", "--port", "1", "--ready-check-timeout-sec", "0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--dataset-name", "azure"], "needs --dataset-path"),
        (["serve", "--dataset-name", "sonnet"], "sonnet"),
        (["serve", "--metric-percentiles", "50,x"], "not a list of numbers"),
        (["serve", "--num-prompts", "0"], "--num-prompts must be positive"),
        (["serve", "--port", "1", "--ready-check-timeout-sec", "0"], "no answer from the server"),
        # Before anything is sent: there is no server.
        ([*NO_SERVER, "--metric-percentiles", "50,101"], "--metric-percentiles must be in"),
        ([*NO_SERVER, "--metric-percentiles", "nan"], "--metric-percentiles must be a number"),
        ([*NO_SERVER, "--percentile-metrics", "ttft,x"], "--percentile-metrics must be one of"),
        ([*NO_SERVER, "--save-result", "--result-dir", f"{__file__}/x"], "--result-dir: "),
        ([*NO_SERVER, "--save-detailed", "--result-filename", "x" * 300], "--result-filename: "),
        ([*NO_SERVER, "--request-rate", "nan"], "--request-rate must be a number"),
        (["latency", "m", "--output-json", f"{__file__}/x"], "--output-json: "),
        (["latency", "m", "--host-cache-memory", "inf"], "--host-cache-memory must be in"),
        (["latency", "m", "--host-cache-memory", "1e400"], "--host-cache-memory must be in"),
        (["latency", "m", "--num-pages", "9" * 5000], "--num-pages"),
        (["peers", "m", "--concurrency", "0"], "concurrency must be positive"),
        (["peers", "m", "--sides", "ollama"], "ollama"),
        (["peers", __file__], "not a GGUF file"),
        (["policies", "m", "--sides", "fcfs,best"], "best"),
        (["predictor", "m", "--predictors", "magic"], "magic"),
        (["policies", "m", "--load", "0"], "load must be positive"),
        (["fairness", "m", "--ratio", "0"], "ratio must be positive"),
        (["chunked-prefill", "m", "--budgets", "8"], "leaves too little room"),
        (["prefix-cache", "m", "--part", "chat", "--num-sessions", "2"], "at least 3 sessions"),
        (["prefix-cache", "m", "--part", "shared", "--rounds", "0"], "rounds must be positive"),
        (["startup", "m", "--num-iters", "0"], "--num-iters must be positive"),
    ],
)
def test_bad_options_end_with_a_message(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_serve_reports_and_saves(server_port: int, tmp_path: Path) -> None:
    result = invoke(
        "serve", "--port", str(server_port), "--num-prompts", "12", "--random-input-len", "10",
        "--random-output-len", "8", "--max-concurrency", "4", "--request-rate", "200",
        "--metric-percentiles", "50,99", "--num-warmups", "2", "--save-detailed", "--disable-tqdm",
        "--result-dir", str(tmp_path), "--result-filename", "r.json", "--max-input-len", "9",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Cut: 12 prompts, 0 answers" in result.output
    assert "Successful requests:                     12" in result.output
    assert "P50 E2EL (ms):" in result.output
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["completed"] == 12 and saved["failed"] == 0
    assert saved["total_input_tokens"] == 12 * 9 and saved["total_output_tokens"] == 12 * 8
    assert saved["model_id"] == "fake" and saved["request_rate"] == "200.0"
    assert saved["p99_itl_ms"] > 0 and saved["mean_ttft_ms"] > 0
    assert [len(itl) for itl in saved["itls"]] == [7] * 12


def test_serve_replays_a_trace_at_its_own_times(server_port: int, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": t, "input_length": 9, "output_length": 3, "hash_ids": [1]}
             for t in (0, 2000, 4000)]  # fmt: skip
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = invoke(
        "serve", "--port", str(server_port), "--dataset-name", "mooncake", "--dataset-path",
        str(trace), "--time-scale", "0.1", "--save-detailed", "--disable-tqdm",
        "--result-dir", str(tmp_path), "--result-filename", "r.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["request_rate"] == "trace"
    assert saved["start_times"] == pytest.approx([0, 0.2, 0.4], abs=0.1)


def test_serve_counts_failures_and_says_why(server_port: int) -> None:
    result = invoke(
        "serve", "--port", str(server_port), "--num-prompts", "3", "--random-input-len", "999",
        "--disable-tqdm",
    )  # fmt: skip
    assert result.exit_code == 0
    assert "Failed requests:                         3" in result.output
    assert "3 x INVALID_ARGUMENT" in result.output
