"""`jaxserve bench startup`: seconds from process start to READY."""

from pathlib import Path

import click

from jaxserve.cli.benchmark import disable_tqdm_option, number, output_json_option, write_json
from jaxserve.cli.options import Command, engine_options
from jaxserve.core.config import EngineConfig


@click.command(cls=Command)
@number("--num-iters-cold", 3, "Starts with an empty compilation cache.")
@number("--num-iters-warm", 3, "Starts with a filled one.")
@number("--num-iters", None, "Sets both.")
@number("--timeout", 600.0, "Seconds that one start may take.", float)
@output_json_option
@disable_tqdm_option
@engine_options(exclude=("compilation_cache_dir",))
def startup(
    config: EngineConfig,
    num_iters_cold: int,
    num_iters_warm: int,
    num_iters: int | None,
    timeout: float,
    output_json: Path | None,
    disable_tqdm: bool,
) -> None:
    """Seconds from process start to READY, and programs compiled, cold and warm."""
    from jaxserve.bench.startup import format_startups, run_startups, summarize_startups

    results = run_startups(
        config,
        num_iters_cold=num_iters_cold if num_iters is None else num_iters,
        num_iters_warm=num_iters_warm if num_iters is None else num_iters,
        timeout=timeout,
        progress=not disable_tqdm,
    )
    fields = summarize_startups(results)
    click.echo(format_startups(fields))
    write_json(output_json, fields)
