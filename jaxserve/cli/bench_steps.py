"""`jaxserve bench steps`: what a decode step takes by rows and context, and attention's share."""

import dataclasses
from pathlib import Path

import click

from jaxserve.cli.bench_options import NumberList, number, output_json_option, write_json
from jaxserve.cli.options import Command, engine_options
from jaxserve.core.config import EngineConfig


@click.command("steps", cls=Command)
@click.option("--rows", type=NumberList(int), default=(1, 8, 32), show_default="1,8,32",
              help="Requests that decode at the same time.")  # fmt: skip
@click.option("--context-lens", type=NumberList(int), default=(128, 512), show_default="128,512",
              help="Tokens that each of them attends to.")  # fmt: skip
@number("--rounds", 9, "Timed steps of each kind, in turns; the median counts.")
@output_json_option
@engine_options(include=("model", "seed", "page_size", "compilation_cache_dir", "dtype",
                         "kv_cache_dtype", "attention_implementation", "linear_implementation",
                         "random_weights"))  # fmt: skip
def steps(
    config: EngineConfig,
    rows: tuple[int, ...],
    context_lens: tuple[int, ...],
    rounds: int,
    output_json: Path | None,
) -> None:
    """Device time of a decode step by rows and context, and attention's share of it.

    The share is what a step takes longer than one whose rows attend to themselves only.
    """
    from jaxserve.bench.step_time import format_contexts, measure_contexts
    from jaxserve.engine.build import build_sync_engine

    contexts = tuple(sorted({1, *context_lens}))
    if min(*rows, rounds, contexts[0]) < 1 or len(contexts) == 1:
        raise click.UsageError("--rows and --rounds must be positive, --context-lens above 1")
    sizes = ",".join(map(str, sorted(rows)))
    config = dataclasses.replace(
        config,
        max_num_seqs=max(rows),
        max_num_batched_tokens=max(rows),
        max_model_len=contexts[-1],
        num_pages=max(rows) * -(-contexts[-1] // config.page_size),  # no row shares another's
        token_buckets=sizes,
        row_buckets=sizes,
    )
    seconds = measure_contexts(build_sync_engine(config), sorted(rows), contexts, rounds)
    click.echo(format_contexts(seconds))
    write_json(output_json, {"step_seconds": seconds})
