"""`jaxserve bench grammars`: answers under random JSON schemas, judged, and what that costs."""

import sys
from pathlib import Path
from typing import Any

import click

from jaxserve.cli.bench_options import disable_tqdm_option, number, output_json_option, write_json
from jaxserve.cli.options import Command, engine_options
from jaxserve.core.config import EngineConfig


@click.command(cls=Command)
@number("--num-schemas", 1000, "Schemas, each for one answer.")
@number("--max-tokens", 256, "Tokens per answer at most; answers cut by it are counted apart.")
@number("--max-depth", 3, "How deep objects and arrays are nested.")
@number("--temperature", 1.0, "Of the sampling.", float)
@number("--rounds", 4, "Parts in which the schemas are run, with and without grammars in turns.")
@output_json_option
@disable_tqdm_option
# A prompt that is run again would be found in a cache: the second side would seem faster.
@engine_options(defaults={"prefix_cache": False})
def grammars(
    config: EngineConfig, output_json: Path | None, disable_tqdm: bool, **options: Any
) -> None:
    """Whether answers under random JSON schemas parse and fit, and what grammars cost.

    Ends with 1 if a finished answer does not fit its schema.
    """
    import contextlib
    import dataclasses

    from jaxserve.bench.grammars import (
        GrammarSpec,
        format_grammars,
        measure_grammars,
        schema_judge,
    )
    from jaxserve.engine.build import build_sync_engine

    spec = GrammarSpec(seed=config.seed, **options)
    judge = schema_judge()
    # All requests of a round are given at once, so all of them must be allowed to wait.
    waiting = max(config.max_waiting, spec.num_schemas)
    config = dataclasses.replace(config, max_waiting=waiting)
    with contextlib.closing(build_sync_engine(config, progress=not disable_tqdm)) as engine:
        result = measure_grammars(engine, spec, judge, progress=not disable_tqdm)
    click.echo(format_grammars(result))
    write_json(output_json, result)
    if result["valid"] < result["finished"]:
        sys.exit(1)
