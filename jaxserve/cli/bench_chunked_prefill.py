"""`jaxserve bench chunked-prefill`: what a long prompt does to streams that are under way."""

from pathlib import Path
from typing import Any

import click

from jaxserve.cli.bench_options import (
    NumberList,
    disable_tqdm_option,
    number,
    output_json_option,
    write_json,
)
from jaxserve.cli.bench_prefix_cache import quiet_engines
from jaxserve.cli.options import Command, engine_options
from jaxserve.core.config import EngineConfig

BUDGETS = (32, 64, 128, 256, 512)


@click.command("chunked-prefill", cls=Command)
@number("--num-streams", 8, "Requests that decode when the prompt arrives.")
@number("--stream-prompt-len", 32, "Tokens of each one's prompt.")
@number("--prompt-len", 2000, "Tokens of the prompt that arrives.")
@number("--steady-tokens", 16, "Tokens that each stream has by then.")
@number("--answer-len", 8, "Tokens answered to the prompt.")
@click.option("--budgets", type=NumberList(int), default=BUDGETS,
              show_default=",".join(map(str, BUDGETS)), help="Fixed token budgets.")  # fmt: skip
@number(
    "--tpot-ms",
    None,
    "Longest step of the side tpot (default: three times the streams' steady gap).",
    float,
)
@number("--rounds", 3, "Rounds that count; each side's median is shown.")
@output_json_option
@disable_tqdm_option
@engine_options(
    include=("model", "random_weights", "dtype", "seed", "compilation_cache_dir",
             "kv_cache_dtype", "page_size", "overlap"),
)  # fmt: skip
def chunked_prefill(
    config: EngineConfig, output_json: Path | None, disable_tqdm: bool, **options: Any
) -> None:
    """Gaps between tokens of running streams when a long prompt arrives.

    Compares stall-free chunked prefill with several token budgets, with one that keeps steps
    within --tpot-ms, and with computing the whole prompt first.
    """
    from jaxserve.bench.chunked_prefill import (
        ChunkedPrefillSpec,
        format_chunked_prefill,
        measure_chunked_prefill,
    )

    spec = ChunkedPrefillSpec(seed=config.seed, **options)
    result = measure_chunked_prefill(config, spec, build=quiet_engines(), progress=not disable_tqdm)
    click.echo(format_chunked_prefill(result, spec))
    write_json(output_json, result)
