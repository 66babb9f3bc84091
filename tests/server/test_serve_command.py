"""`jaxserve serve`: errors end it with a message and exit code 1."""

import socket
import sys
import types

import pytest
from click.testing import CliRunner

from jaxserve.cli.serve import serve
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import CheckpointError


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[EngineConfig]:
    """What `build_engine` was called with; it finds no checkpoint. JAX is not imported."""
    got: list[EngineConfig] = []

    def build_engine(config: EngineConfig) -> None:
        got.append(config)
        raise CheckpointError(f"no checkpoint {config.model}")

    fake = types.ModuleType("jaxserve.engine.build")
    fake.build_engine = build_engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jaxserve.engine.build", fake)
    return got


def test_a_failing_start_is_a_message(configs: list[EngineConfig]) -> None:
    result = CliRunner().invoke(serve, ["m", "--port", "0", "--page-size", "32"])
    assert (result.exit_code, result.output) == (1, "Error: no checkpoint m\n")
    assert configs == [EngineConfig(model="m", page_size=32)]


def test_a_taken_port_is_a_message_before_anything_is_loaded(configs: list[EngineConfig]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(serve, ["m", "--port", str(port)])
    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in result.output
    assert not configs


@pytest.mark.parametrize(
    ("option", "value"), [("--port", "70000"), ("--grace-period", "-1"), ("--max-message-mib", "0")]
)
def test_impossible_server_options_are_messages(
    configs: list[EngineConfig], option: str, value: str
) -> None:
    result = CliRunner().invoke(serve, ["m", option, value])
    assert result.exit_code == 1 and value.lstrip("-") in result.output
    assert not configs
