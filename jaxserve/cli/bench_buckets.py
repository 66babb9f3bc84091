"""`jaxserve bench buckets`: which shapes to compile, by a trace or by what was served."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxserve.cli.bench_options import NumberList, number, output_json_option, write_json
from jaxserve.cli.options import Command, engine_options
from jaxserve.core.config import EngineConfig

if TYPE_CHECKING:
    from jaxserve.bench.buckets import BucketReport
    from jaxserve.bench.workloads import WorkloadItem

VOCAB_SIZE = 32_000  # which tokens a trace's prompts are made of does not matter here
MAX_TRACE_REQUESTS = 10_000
DEVICE_OPTIONS = (
    "model", "random_weights", "dtype", "seed", "attention_implementation",
    "linear_implementation", "compilation_cache_dir", "kv_cache_dtype", "kv_cache_memory",
)  # fmt: skip
REPLAYED_OPTIONS = (  # as `bench.replay.REPLAYED`, which needs imports that --help does not
    "page_size", "num_pages", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "policy",
    "prefix_cache", "starvation_timeout", "admission", "prefill_first", "slice_tokens",
)  # fmt: skip


def trace_option(*, required: bool = False) -> Callable[..., Any]:
    """The option for a trace's file; the name says which kind it is."""
    return click.option(
        "--trace", type=click.Path(path_type=Path, dir_okay=False), default=None,
        required=required, help="A trace: Azure's .csv or Mooncake's .jsonl.",
    )  # fmt: skip


def load_trace(path: Path, num_requests: int, seed: int) -> "list[WorkloadItem]":
    """The first requests of a trace, with random prompts of its lengths.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    from jaxserve.bench.workloads import WorkloadSpec, build_workload

    kind = "mooncake" if path.suffix == ".jsonl" else "azure"
    spec = WorkloadSpec(dataset_name=kind, dataset_path=path, num_prompts=num_requests, seed=seed)
    return list(build_workload(spec, VOCAB_SIZE).items)


@click.command(cls=Command)
@trace_option()
@click.option("--histogram", type=click.Path(path_type=Path, dir_okay=False), default=None,
              help="What `jaxserve serve --step-histogram` wrote.")  # fmt: skip
@number("--num-programs", None, "Token buckets at most (default: as many as doubling ones).")
@number("--num-row-programs", None, "Row buckets at most, likewise.")
@click.option("--cost", type=click.Choice(["tokens", "time"]), default="tokens", show_default=True,
              help="Minimise the tokens that are run, or the time of the steps.")  # fmt: skip
@click.option("--step-ms", type=NumberList(float), default=None, metavar="BASE,PER_TOKEN",
              help="The time of a step (default: measured on MODEL).")  # fmt: skip
@number("--num-requests", MAX_TRACE_REQUESTS, "Of a trace: its first ones.")
@number("--length-scale", 1.0, "Of a trace: shorten prompts and answers.", float)
@number(
    "--utilisation",
    None,
    "Of a trace: stretch arrivals to this part of what the engine can do.",
    float,
)
@output_json_option
@engine_options(include=(*DEVICE_OPTIONS, *REPLAYED_OPTIONS), model_required=False)
def buckets(
    config: EngineConfig,
    trace: Path | None,
    histogram: Path | None,
    num_programs: int | None,
    num_row_programs: int | None,
    cost: str,
    step_ms: tuple[float, ...] | None,
    num_requests: int,
    length_scale: float,
    utilisation: float | None,
    output_json: Path | None,
) -> None:
    """Choose the buckets that steps are padded to, from a trace or from what was served.

    A trace is replayed through the scheduler in simulated time.
    """
    from jaxserve.bench.buckets import choose_buckets_from_histogram
    from jaxserve.core.step_histogram import StepHistogram

    if (trace is None) == (histogram is None):
        raise click.UsageError("give either --trace or --histogram")
    if cost == "time" and step_ms is not None:
        raise click.UsageError("--cost time is measured, it takes no --step-ms")
    if step_ms is not None and len(step_ms) != 2:
        raise click.UsageError("--step-ms takes two numbers, BASE,PER_TOKEN")
    measured = _measure(config) if cost == "time" or (trace and step_ms is None) else {}
    programs = {"num_programs": num_programs, "num_row_programs": num_row_programs}
    if trace is None:
        assert histogram is not None
        report = choose_buckets_from_histogram(
            StepHistogram.load(histogram),
            max_tokens=config.max_num_batched_tokens,
            max_rows=config.max_num_seqs,
            cost=_tabled(measured) if cost == "time" else None,
            **programs,
        )
    else:
        items = load_trace(trace, num_requests, config.seed)
        report = _from_trace(
            config, items, measured, step_ms, length_scale, utilisation, cost, programs
        )
    click.echo(str(report))
    write_json(output_json, report.to_dict())


def _measure(config: EngineConfig) -> dict[int, float]:
    """Seconds of the model's steps that fill doubling buckets."""
    import dataclasses

    from jaxserve.bench.step_time import measure_engine
    from jaxserve.engine.build import build_sync_engine
    from jaxserve.runner.buckets import doubling_buckets

    engine = build_sync_engine(dataclasses.replace(config, policy="fcfs"))  # none is asked
    return measure_engine(engine, doubling_buckets(config.max_num_batched_tokens))


def _tabled(measured: dict[int, float]) -> Callable[[int], float]:
    from jaxserve.bench.step_time import TabledCost

    return TabledCost(measured)


def _from_trace(
    config: EngineConfig,
    items: "list[WorkloadItem]",
    measured: dict[int, float],
    step_ms: tuple[float, ...] | None,
    length_scale: float,
    utilisation: float | None,
    cost: str,
    programs: dict[str, int | None],
) -> "BucketReport":
    from jaxserve.bench.buckets import choose_buckets_from_trace
    from jaxserve.bench.replay import ReplayLimits, at_utilisation, fit_lengths, scale_lengths
    from jaxserve.bench.step_time import LinearCost

    if step_ms is None:
        line = LinearCost.fit(measured)
    else:
        line = LinearCost(step_ms[0] / 1e3, step_ms[1] / 1e3)
    click.echo(f"A step takes {line.base * 1e3:.1f} ms + {line.per_token * 1e3:.3f} ms per token")
    items = scale_lengths(items, length_scale)
    longest = max(len(item.prompt_token_ids) + item.output_len for item in items)
    max_model_len = config.max_model_len or longest
    # As many pages as can be used, if the options do not say.
    pages = config.max_num_seqs * -(-max_model_len // config.page_size)
    limits = ReplayLimits.of_config(
        config, num_pages=config.num_pages or pages, max_model_len=max_model_len
    )
    items = fit_lengths(items, max_model_len)
    if utilisation is not None:
        items = at_utilisation(items, utilisation, limits, line)
    return choose_buckets_from_trace(
        items, limits, line, cost=_tabled(measured) if cost == "time" else None, **programs
    )
