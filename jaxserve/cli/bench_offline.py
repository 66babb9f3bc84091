"""`jaxserve bench throughput`, `latency` and `startup`: the engine on this machine."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jaxserve.cli.bench_options import (
    build_workload,
    dataset_options,
    disable_tqdm_option,
    number,
    output_json_option,
    write_json,
)
from jaxserve.cli.options import Command, engine_options
from jaxserve.core.config import EngineConfig

if TYPE_CHECKING:
    from jaxserve.bench.workloads import WorkloadSpec

# What a batch has computed would be found by the next one: a cache, not the engine, is timed.
_WITHOUT_CACHE = {"prefix_cache": False}


@click.command(cls=Command)
@output_json_option
@disable_tqdm_option
@engine_options(defaults=_WITHOUT_CACHE)
@dataset_options
@number("--input-len", None, "random: the same as --random-input-len.")
@number("--output-len", None, "random: the same as --random-output-len.")
def throughput(
    config: EngineConfig,
    dataset: "WorkloadSpec",
    input_len: int | None,
    output_len: int | None,
    output_json: Path | None,
    disable_tqdm: bool,
) -> None:
    """Offline throughput: give the engine all requests at once."""
    import dataclasses

    from jaxserve.bench.offline import measure_throughput, require_room
    from jaxserve.llm import LLM

    lengths = {"random_input_len": input_len, "random_output_len": output_len}
    dataset = dataclasses.replace(dataset, **{k: v for k, v in lengths.items() if v is not None})
    # All requests are given at once, so all of them must be allowed to wait.
    waiting = max(config.max_waiting, dataset.num_prompts)
    with contextlib.closing(LLM(**{**dataclasses.asdict(config), "max_waiting": waiting})) as llm:
        info = llm.model_info
        workload = build_workload(dataset, info.vocab_size, info.eos_token_ids)
        require_room(workload.items, info.max_model_len)
        result = measure_throughput(llm, workload.items, progress=not disable_tqdm)
    click.echo(str(result))
    write_json(output_json, result.to_dict())


@click.command(cls=Command)
@number("--input-len", 32, "Tokens per prompt.")
@number("--output-len", 128, "Tokens per answer.")
@number("--batch-size", 8, "Prompts in the batch.")
@number("--num-iters-warmup", 10, "Iterations that are not timed.")
@number("--num-iters", 30, "Iterations that are.")
@output_json_option
@disable_tqdm_option
@engine_options(defaults=_WITHOUT_CACHE)
def latency(
    config: EngineConfig,
    input_len: int,
    output_len: int,
    batch_size: int,
    num_iters_warmup: int,
    num_iters: int,
    output_json: Path | None,
    disable_tqdm: bool,
) -> None:
    """Offline latency of one batch, from all prompts in to the last token out."""
    import dataclasses

    from jaxserve.bench.offline import measure_latency, require_room
    from jaxserve.bench.workloads import WorkloadSpec
    from jaxserve.llm import LLM

    spec = WorkloadSpec(
        num_prompts=batch_size,
        random_input_len=input_len,
        random_output_len=output_len,
        seed=config.seed,
    )
    with contextlib.closing(LLM(**dataclasses.asdict(config))) as llm:
        info = llm.model_info
        workload = build_workload(spec, info.vocab_size, info.eos_token_ids)
        require_room(workload.items, info.max_model_len)
        result = measure_latency(
            llm, workload.items, num_iters=num_iters, num_iters_warmup=num_iters_warmup,
            progress=not disable_tqdm,
        )  # fmt: skip
    click.echo(str(result))
    write_json(output_json, result.to_dict())


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
