"""What `jaxserve serve` makes of its own options."""

from typing import Any

import pytest
from click.testing import CliRunner

import jaxserve.server.serve
from jaxserve.cli.serve import serve


@pytest.mark.parametrize(
    ("given", "port", "may_change"),
    [
        ((), 8000, True),
        (("--http-port", "8000"), 8000, False),
        (("--http-port", "0"), 0, False),
        (("--http-port", "off"), None, False),
    ],
)
def test_http_is_on_by_default(
    given: tuple[str, ...], port: int | None, may_change: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port that somebody has named is taken or refused, never another one."""
    got: list[Any] = []

    async def record(make_engine: Any, options: Any, **_: Any) -> None:
        got.append(options)

    monkeypatch.setattr(jaxserve.server.serve, "serve", record)
    result = CliRunner().invoke(serve, ["model", *given], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (options,) = got
    assert (options.http_port, options.http_port_may_change) == (port, may_change)


@pytest.mark.parametrize("port", ["on", "", "70000"])
def test_what_is_no_port(port: str) -> None:
    result = CliRunner().invoke(serve, ["model", "--http-port", port])
    assert result.exit_code != 0 and "port" in result.output
