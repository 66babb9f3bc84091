"""The options of `serve` about metrics, traces, logs and profiles."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from jaxserve.cli.options import GroupedOption
from jaxserve.core.errors import ConfigError
from jaxserve.server.log_format import FORMATS, LEVELS, configure_logging
from jaxserve.server.metrics.names import COMPAT_CHOICES

_option = functools.partial(click.option, cls=GroupedOption, group="observability")

_OPTIONS = (
    _option("--metrics-compat", type=click.Choice(COMPAT_CHOICES), default="none",
            show_default=True, help="Serve metrics that vLLM has too under its names, for gateways "
            "and dashboards made for it."),
    _option("--otlp-endpoint", default=None, metavar="URL",
            help="Send a trace of every request to this OpenTelemetry collector (OTLP over gRPC, "
            "http://host:4317; needs the extra otel; default: off)."),
    _option("--log-format", type=click.Choice(FORMATS), default="text", show_default=True,
            help="How log lines look."),
    _option("--log-level", type=click.Choice(LEVELS), default=None,
            help="What to log (default: warnings and how the start goes, or what -v says)."),
    _option("--log-requests", is_flag=True,
            help="Log a line for every request that ended: its id, tenant, counts and times."),
    _option("--log-prompts", is_flag=True,
            help="... with the prompt's text, which is otherwise never logged."),
    _option("--profile-dir", type=click.Path(file_okay=False, path_type=Path), default=None,
            help="Where the admin surface may write profiles (default: it takes none)."),
)  # fmt: skip


def observability_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command these options, and its function `observability: ObservabilityOptions`.

    Logging is configured before the function runs.
    """

    @functools.wraps(function)
    def with_options(
        *args: Any,
        metrics_compat: str,
        otlp_endpoint: str | None,
        log_format: str,
        log_level: str | None,
        log_requests: bool,
        log_prompts: bool,
        profile_dir: Path | None,
        **kwargs: Any,
    ) -> Any:
        from jaxserve.server.observability import ObservabilityOptions  # and the whole engine

        try:
            options = ObservabilityOptions(
                metrics_compat=metrics_compat,
                otlp_endpoint=otlp_endpoint,
                log_requests=log_requests,
                log_prompts=log_prompts,
                profile_dir=profile_dir,
            )
        except ConfigError as error:
            raise click.UsageError(str(error)) from error
        configure_logging(log_format, log_level)
        return function(*args, observability=options, **kwargs)

    for option in reversed(_OPTIONS):
        with_options = option(with_options)
    return with_options
