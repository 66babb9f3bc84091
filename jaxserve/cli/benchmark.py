"""What makes a function a command of `jaxserve bench`: flags, a table, JSON."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxserve.cli.options import Command, engine_options, settings_options
from jaxserve.core.config import EngineConfig
from jaxserve.files.writable import require_writable

if TYPE_CHECKING:
    from jaxserve.bench.tables import Result

# The engine's options that commands offer: those that a benchmark does not set itself.
ALL = tuple(field.name for field in dataclasses.fields(EngineConfig))
MODEL = (
    "model", "random_weights", "dtype", "quantization", "activation_dtype", "seed",
    "compilation_cache_dir", "page_size",
)  # fmt: skip
DEVICE = (
    "model", "random_weights", "dtype", "quantization", "activation_dtype", "seed",
    "attention_implementation",
    "linear_implementation", "compilation_cache_dir", "kv_cache_dtype", "kv_cache_memory",
)  # fmt: skip
REPLAYED = (  # page_size, too, but where a benchmark has several
    "num_pages", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "policy",
    "prefix_cache", "starvation_timeout", "admission", "prefill_first", "slice_tokens",
)  # fmt: skip
BATCH = (*MODEL, "max_num_seqs", "max_num_batched_tokens", "overlap")

disable_tqdm_option = click.option("--disable-tqdm", is_flag=True, help="Show no progress bar.")


def benchmark(
    engine: Collection[str] = (),
    *,
    model_required: bool = True,
    defaults: Mapping[str, Any] | None = None,
    **specs: type,
) -> Callable[[Callable[..., "Result"]], click.Command]:
    """Make a command of a function that returns a `Result`, which is shown and written as JSON.

    The function's name is the command's, its docstring the help text. It is given `progress`,
    whether to show bars, and what the arguments say.

    Args:
        engine: options of the engine; with any, the function is given a `config`.
        model_required: see `engine_options`.
        defaults: other defaults than `EngineConfig`'s.
        specs: dataclasses of settings, by the parameter that takes them.
    """

    def decorate(function: Callable[..., "Result"]) -> click.Command:
        @functools.wraps(function)
        def run(output_json: Path | None, disable_tqdm: bool, **given: Any) -> None:
            if output_json is not None:
                require_writable(output_json, "--output-json")
            result: Any = function(progress=not disable_tqdm, **given)
            click.echo(str(result))
            write_json(output_json, dataclasses.asdict(result))
            if result.failed:
                sys.exit(1)

        command: Callable[..., Any] = disable_tqdm_option(run)
        command = click.option(
            "--output-json", type=click.Path(path_type=Path, dir_okay=False), default=None,
            help="Write the results as JSON, too.",
        )(command)  # fmt: skip
        for parameter, spec in reversed(specs.items()):
            command = settings_options(spec, parameter)(command)
        if engine:
            command = engine_options(
                command, include=engine, model_required=model_required, defaults=defaults
            )
        name = function.__name__.replace("_", "-")
        return click.command(name, cls=Command)(command)

    return decorate


def write_json(path: Path | None, fields: dict[str, Any]) -> None:
    """Write a command's results, if a path was given; its folder is made."""
    import json

    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(fields, indent=4, default=str) + "\n", encoding="utf-8")
