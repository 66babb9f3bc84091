"""`jaxserve serve`: one model behind a gRPC port, and an HTTP port."""

import asyncio
import logging
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from jaxserve.cli.observability_options import observability_options
from jaxserve.cli.options import Command, engine_options
from jaxserve.cli.security_options import security_options
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import StepHung
from jaxserve.files.writable import require_writable
from jaxserve.server.reasoning.registry import REASONING_PARSER_NAMES
from jaxserve.server.tools.registry import TOOL_PARSER_NAMES

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncEngine
    from jaxserve.server.observability import ObservabilityOptions
    from jaxserve.server.security.options import SecurityOptions
    from jaxserve.server.security.tls import Tls

HTTP_PORT = 8000


class HttpPort(click.ParamType):
    """A number, or `off` for None."""

    name = "port"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        """The port, if any."""
        if value == "off":
            return None
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a port nor 'off'", param, ctx)


@click.command(cls=Command)
@click.option("--host", default="127.0.0.1", show_default=True, help="Interface to listen on.")
@click.option("--port", type=int, default=50051, show_default=True,
              help="gRPC port; 0 takes a free one, named in the READY line.")  # fmt: skip
@click.option("--http-port", type=HttpPort(), default=HTTP_PORT, metavar="PORT|off",
              help="Port of the OpenAI-compatible HTTP API and the page; 0 takes a free one, named "
              f"in the READY line; off leaves HTTP out (default: {HTTP_PORT}, or a free one if "
              "that is taken).")  # fmt: skip
@click.option("--cors-origins", default="", metavar="ORIGIN,...",
              help="Origins whose web pages may call the HTTP API, such as "
              "https://chat.example.org; * for all (default: none).")  # fmt: skip
@click.option("--tool-call-parser", type=click.Choice(TOOL_PARSER_NAMES), default="auto",
              show_default=True, help="How the model writes tool calls; auto goes by its chat "
              "template and family.")  # fmt: skip
@click.option("--reasoning-parser", type=click.Choice(REASONING_PARSER_NAMES), default="none",
              show_default=True, help="The markers around what the model thinks before it "
              "answers, for reasoning_content and thinking_token_budget.")  # fmt: skip
@click.option("--grace-period", type=float, default=30.0, show_default=True, metavar="SECONDS",
              help="Time for running requests to finish after SIGTERM or Ctrl-C; "
              "a second signal stops at once.")  # fmt: skip
@click.option("--max-message-mib", type=float, default=16.0, show_default=True, metavar="MIB",
              help="Largest message, either way.")  # fmt: skip
@click.option("--max-connections", type=int, default=4096, show_default=True, metavar="N",
              help="Clients connected to a port at a time; more are turned away.")  # fmt: skip
@click.option("--read-timeout", type=float, default=30.0, show_default=True, metavar="SECONDS",
              help="Time in which a client must have sent what it began.")  # fmt: skip
@click.option("--write-timeout", type=float, default=30.0, show_default=True, metavar="SECONDS",
              help="A stream whose client reads nothing for so long is cut off.")  # fmt: skip
@click.option("--step-timeout", type=float, default=None, metavar="SECONDS",
              help="A step that takes longer is taken to hang, and ends the server (default: 20 "
              "times the longest so far, at least 300).")  # fmt: skip
@click.option("--metrics-port", type=int, default=None, metavar="PORT",
              help="Serve Prometheus metrics over HTTP on this port (default: off).")  # fmt: skip
@click.option("--step-histogram", type=click.Path(dir_okay=False, path_type=Path), default=None,
              help="On exit write how large steps were, for `jaxserve bench buckets`.")  # fmt: skip
@observability_options
@security_options
@engine_options
def serve(
    config: EngineConfig,
    observability: "ObservabilityOptions",
    security: "SecurityOptions",
    tls: "Tls | None",
    host: str,
    port: int,
    http_port: int | None,
    cors_origins: str,
    tool_call_parser: str,
    reasoning_parser: str,
    grace_period: float,
    max_message_mib: float,
    max_connections: int,
    read_timeout: float,
    write_timeout: float,
    step_timeout: float | None,
    metrics_port: int | None,
    step_histogram: Path | None,
) -> None:
    """Serve MODEL over gRPC and HTTP.

    MODEL is the name of a pulled model (smollm2-135m), a checkpoint directory or GGUF file, a
    hub name, or, with --random-weights, a preset. A line that begins with READY, and says where,
    appears on stdout once requests are taken.
    """
    from jaxserve.engine.stages import stage
    from jaxserve.server.serve import has_threads  # half a second: not for --help
    from jaxserve.server.serve import serve as serve_engine
    from jaxserve.server.server import ServerOptions

    options = ServerOptions(
        host=host,
        port=port,
        grace_period=grace_period,
        max_message_mib=max_message_mib,
        max_connections=max_connections,
        read_timeout=read_timeout,
        write_timeout=write_timeout,
        step_timeout=step_timeout,
        tls=tls,
        metrics_port=metrics_port,
        http_port=http_port,
        http_port_may_change=_is_default("http_port"),
        cors_origins=tuple(origin.strip() for origin in cors_origins.split(",") if origin.strip()),
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
    )

    if step_histogram is not None:
        require_writable(step_histogram, "--step-histogram")
    engines: list[AsyncEngine] = []
    threads = threading.enumerate()

    def make_engine() -> "AsyncEngine":
        with stage("imports", "JAX and the engine imported"):  # only now, and on this thread
            from jaxserve.engine.build import build_engine

        engines.append(build_engine(config))
        return engines[0]

    try:
        status = asyncio.run(
            serve_engine(make_engine, options, observability=observability, security=security)
        )
    except StepHung as error:
        click.echo(f"Error: {error}", err=True)
        status = error.exit_status
    finally:
        if step_histogram is not None and engines:
            engines[0].histogram.save(step_histogram)
    if has_threads(threads):
        # A compiler at work, or a step that hangs, would crash in the interpreter's teardown.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _is_default(option: str) -> bool:
    """Whether nobody has named a value for this option of the command that runs."""
    source = click.get_current_context().get_parameter_source(option)
    return source is ParameterSource.DEFAULT
