"""`jaxserve bench fairness`: two tenants, one of which sends ten times as much."""

from pathlib import Path
from typing import Any

import click

from jaxserve.cli.bench_options import disable_tqdm_option, number, output_json_option, write_json
from jaxserve.cli.bench_prefix_cache import quiet_engines
from jaxserve.cli.options import Command, engine_options
from jaxserve.core.config import EngineConfig


@click.command(cls=Command)
@number("--light-requests", 24, "Requests of the tenant that sends less.")
@number("--ratio", 10, "The other one sends so many times as many.")
@number("--input-len", 64, "Tokens per prompt.")
@number("--output-len", 32, "Tokens per answer.")
@number("--rounds", 2, "Rounds of each policy.")
@output_json_option
@disable_tqdm_option
@engine_options(
    include=("model", "random_weights", "dtype", "seed", "compilation_cache_dir", "page_size",
             "max_num_seqs", "max_num_batched_tokens", "overlap"),
    defaults={"max_num_seqs": 8, "max_num_batched_tokens": 128},
)  # fmt: skip
def fairness(
    config: EngineConfig, output_json: Path | None, disable_tqdm: bool, **options: Any
) -> None:
    """Difference in service between two tenants under vtc and fcfs, and what fairness costs."""
    from jaxserve.bench.fairness import FairnessSpec, format_fairness, measure_fairness

    spec = FairnessSpec(seed=config.seed, **options)
    result = measure_fairness(config, spec, build=quiet_engines(), progress=not disable_tqdm)
    click.echo(format_fairness(result, spec))
    write_json(output_json, result)
