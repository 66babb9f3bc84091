"""`jaxserve bench padding`: what is computed and kept for nothing."""

from pathlib import Path

import click

from jaxserve.cli.bench_buckets import (
    DEVICE_OPTIONS,
    REPLAYED_OPTIONS,
    load_trace,
    trace_option,
)
from jaxserve.cli.bench_options import (
    NumberList,
    disable_tqdm_option,
    number,
    output_json_option,
    write_json,
)
from jaxserve.cli.options import Command, engine_options
from jaxserve.core.config import EngineConfig

_REPLAYED = tuple(name for name in REPLAYED_OPTIONS if name != "page_size")  # there are several


@click.command(cls=Command)
@trace_option(required=True)
@number("--num-requests", 100, "Requests that are served, the trace's first.")
@number("--num-calibration", 2000, "Requests after those, from which buckets are chosen.")
@number("--length-scale", 0.125, "Shorten prompts and answers by this factor.", float)
@number("--utilisation", 0.7, "Load, as a part of what the engine can do.", float)
@click.option("--page-sizes", type=NumberList(int), default=(64, 32, 16), show_default="64,32,16",
              help="Tokens per KV page, one run each.")  # fmt: skip
@output_json_option
@disable_tqdm_option
@engine_options(include=(*DEVICE_OPTIONS, "overlap", "length_predictor", *_REPLAYED),
                model_required=False, defaults={"max_model_len": 2048})  # fmt: skip
def padding(
    config: EngineConfig,
    trace: Path,
    num_requests: int,
    num_calibration: int,
    length_scale: float,
    utilisation: float,
    page_sizes: tuple[int, ...],
    output_json: Path | None,
    disable_tqdm: bool,
) -> None:
    """Padding of steps and unused KV on a trace, with doubling and with chosen buckets."""
    from jaxserve.bench.padding import PaddingSpec, measure_padding
    from jaxserve.engine.build import build_sync_engine

    spec = PaddingSpec(
        num_requests=num_requests,
        num_calibration=num_calibration,
        length_scale=length_scale,
        utilisation=utilisation,
        page_sizes=page_sizes,
    )
    items = load_trace(trace, num_requests + num_calibration, config.seed)
    result = measure_padding(config, items, spec, build_sync_engine, progress=not disable_tqdm)
    click.echo(str(result))
    write_json(output_json, result.to_dict())
