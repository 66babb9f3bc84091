"""`jaxserve bench policies`: one bursty trace of real prompts under every policy."""

from pathlib import Path
from typing import Any

import click

from jaxserve.cli.bench_options import disable_tqdm_option, number, output_json_option, write_json
from jaxserve.cli.bench_prefix_cache import quiet_engines
from jaxserve.cli.bench_prompts import tokenize_prompts
from jaxserve.cli.options import Command, engine_options
from jaxserve.core.config import EngineConfig

SIDES = "fcfs,sjf:oracle,srtf:oracle,srtf:exact,mlfq,ltr:rank,deadline,priority"


@click.command(cls=Command)
@click.option("--sides", default=SIDES, show_default=True,
              help="POLICY or POLICY:PREDICTOR, with commas between; the others are compared "
              "with the first.")  # fmt: skip
@number("--num-requests", 160, "Requests of the trace.", click.IntRange(min=1))
@number("--num-lessons", 192, "Other prompts, answered before, that predictors learn from.",
        click.IntRange(min=0))  # fmt: skip
@number("--long-share", 0.15, "Share of prompts that ask for long answers.", float)
@number("--max-output-len", 512, "Longest answer, in tokens.")
@number("--load", 0.9, "Arrivals, as a share of the capacity measured first.", float)
@number("--burstiness", 0.1,
        "Shape of the gamma-distributed gaps: 1 is a Poisson process, less is burstier.",
        float)  # fmt: skip
@number("--ttft-target", 1.0, "Seconds, of the interactive half; ten times that for the others.",
        float)  # fmt: skip
@number("--tpot-target", 0.2, "Seconds per token after the first, of all.", float)
@output_json_option
@disable_tqdm_option
@engine_options(
    include=("model", "tokenizer", "random_weights", "dtype", "seed", "compilation_cache_dir",
             "page_size", "num_pages", "prefix_cache", "host_cache_memory", "max_num_seqs",
             "max_num_batched_tokens", "starvation_timeout", "preemption", "shed_late",
             "overlap"),
    defaults={"max_num_seqs": 4, "max_num_batched_tokens": 128},
)  # fmt: skip
def policies(
    config: EngineConfig,
    sides: str,
    num_requests: int,
    num_lessons: int,
    long_share: float,
    output_json: Path | None,
    disable_tqdm: bool,
    **options: Any,
) -> None:
    """Latency, TTFT and SLO attainment of every policy on one bursty trace.

    The prompts are chat prompts with answers of one word to --max-output-len tokens. All sides
    serve the same ones at the same times, on engines of their own, one after the other.
    """
    import tempfile

    from jaxserve.bench.policies import PoliciesSpec, PolicyBench, format_policies
    from jaxserve.bench.prompt_mix import mix_prompts

    spec = PoliciesSpec(sides=tuple(sides.split(",")), seed=config.seed, **options)
    mix = mix_prompts(num_requests + num_lessons, long_share, seed=config.seed)
    prompts = tokenize_prompts(config, mix)
    with tempfile.TemporaryDirectory(prefix="jaxserve-predictors-") as directory:
        result = PolicyBench(
            config,
            spec,
            prompts[:num_requests],
            prompts[num_requests:],
            Path(directory),
            build=quiet_engines(),
            progress=not disable_tqdm,
        ).run()
    click.echo(format_policies(result, spec))
    write_json(output_json, result)
