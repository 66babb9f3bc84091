"""The options of `serve` about metrics, traces, logs and profiles."""

import logging
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from jaxserve.cli.observability_options import observability_options
from jaxserve.cli.options import Command
from jaxserve.cli.serve import serve
from jaxserve.server.log_format import JsonFormatter, TextFormatter
from jaxserve.server.observability import ObservabilityOptions


@pytest.fixture(autouse=True)
def handler() -> logging.Handler:
    """A handler of the root logger."""
    added = logging.NullHandler()
    logging.getLogger().addHandler(added)
    return added


def invoke(*args: str) -> tuple[Result, list[ObservabilityOptions]]:
    got: list[ObservabilityOptions] = []

    @click.command(cls=Command)
    @observability_options
    def command(observability: ObservabilityOptions) -> None:
        got.append(observability)

    return CliRunner().invoke(command, args), got


def test_defaults(handler: logging.Handler) -> None:
    result, got = invoke()
    assert result.exit_code == 0 and got == [ObservabilityOptions()]
    assert isinstance(handler.formatter, TextFormatter)


def test_all_of_them(handler: logging.Handler) -> None:
    result, got = invoke(
        "--metrics-compat", "vllm", "--otlp-endpoint", "http://c:4317", "--log-format", "json",
        "--log-level", "info", "--log-requests", "--log-prompts", "--profile-dir", "p",
    )  # fmt: skip
    assert result.exit_code == 0
    assert got == [
        ObservabilityOptions(
            metrics_compat="vllm", otlp_endpoint="http://c:4317", log_requests=True,
            log_prompts=True, profile_dir=Path("p"),
        )
    ]  # fmt: skip
    assert isinstance(handler.formatter, JsonFormatter)
    assert logging.getLogger("jaxserve").level == logging.INFO


def test_prompts_without_requests_are_refused() -> None:
    result, got = invoke("--log-prompts")
    assert result.exit_code == 2 and "log_requests" in result.output and not got


def test_missing_packages_are_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    result = CliRunner().invoke(serve, ["m", "--port", "0", "--otlp-endpoint", "http://c:4317"])
    assert result.exit_code == 1 and "jaxserve[otel]" in result.output


def test_serves_help_has_them() -> None:
    result = CliRunner().invoke(serve, ["--help"])
    assert "Observability options" in result.output
    assert "--metrics-compat" in result.output and "--profile-dir" in result.output
