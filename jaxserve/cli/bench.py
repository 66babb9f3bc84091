"""`jaxserve bench`: throughput, latency, serve, startup (as `vllm bench` has them), and peers."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxserve.cli.options import Command, engine_options
from jaxserve.core.config import EngineConfig

if TYPE_CHECKING:
    from jaxserve.bench.load import LoadResult
    from jaxserve.bench.peers.compare import CompareSpec
    from jaxserve.bench.workloads import Workload, WorkloadSpec

DATASETS = ("random", "prefix_repetition", "azure", "mooncake")


class NumberList(click.ParamType):
    """Comma-separated numbers, as a tuple."""

    name = "number,..."

    def __init__(self, kind: type[int] | type[float]) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text; a default that is a tuple already stays as it is."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._kind(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers", param, ctx)


def _number(flag: str, default: Any, help: str, kind: Any = int) -> Callable[..., Any]:
    shown = default is not None
    return click.option(flag, type=kind, default=default, show_default=shown, help=help)


def dataset_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the dataset's options, and its function a ready `dataset: WorkloadSpec`."""
    names = [
        "dataset_name", "dataset_path", "num_prompts", "random_input_len", "random_output_len",
        "random_range_ratio", "prefix_repetition_prefix_len", "prefix_repetition_suffix_len",
        "prefix_repetition_num_prefixes", "prefix_repetition_output_len", "time_scale",
        "max_input_len", "max_output_len",
    ]  # fmt: skip

    @functools.wraps(function)
    def with_dataset(*args: Any, **kwargs: Any) -> Any:
        from jaxserve.bench.workloads import WorkloadSpec

        seed = kwargs["config"].seed if "config" in kwargs else kwargs.pop("seed")
        spec = WorkloadSpec(seed=seed, **{name: kwargs.pop(name) for name in names})
        return function(*args, dataset=spec, **kwargs)

    options = [
        click.option("--dataset-name", type=click.Choice(DATASETS), default="random",
                     show_default=True, help="What to send; azure and mooncake are traces."),
        click.option("--dataset-path", type=click.Path(path_type=Path), default=None,
                     help="The trace's file: Azure CSV or Mooncake JSONL."),
        _number("--num-prompts", 1000, "Number of requests (of a trace: its first ones)."),
        _number("--random-input-len", 1024, "random: tokens per prompt."),
        _number("--random-output-len", 128, "random: tokens per answer."),
        _number("--random-range-ratio", 0.0,
                "random: lengths vary evenly between (1 - ratio) and (1 + ratio) times.", float),
        _number("--prefix-repetition-prefix-len", 256, "prefix_repetition: tokens per prefix."),
        _number("--prefix-repetition-suffix-len", 256, "prefix_repetition: tokens per suffix."),
        _number("--prefix-repetition-num-prefixes", 10, "prefix_repetition: distinct prefixes."),
        _number("--prefix-repetition-output-len", 128, "prefix_repetition: tokens per answer."),
        _number("--time-scale", 1.0,
                "Traces: multiply arrival times; 0.1 replays ten times as fast.", float),
        _number("--max-input-len", None, "Cut longer prompts to this many tokens."),
        _number("--max-output-len", None, "Cut longer answers to this many tokens."),
    ]  # fmt: skip
    for option in reversed(options):
        with_dataset = option(with_dataset)
    return with_dataset


def _build_workload(spec: "WorkloadSpec", vocab_size: int, avoid: tuple[int, ...]) -> "Workload":
    from jaxserve.bench.workloads import build_workload

    workload = build_workload(spec, vocab_size, avoid)
    click.echo(
        f"{len(workload.items)} requests, {workload.num_input_tokens} tokens in, "
        f"{workload.num_output_tokens} out"
    )
    if workload.num_cut_inputs or workload.num_cut_outputs:
        click.echo(
            f"Cut: {workload.num_cut_inputs} prompts, {workload.num_cut_outputs} answers",
            err=True,
        )
    return workload


def _write_json(path: Path | None, fields: dict[str, Any]) -> None:
    import json

    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(fields, indent=4) + "\n", encoding="utf-8")


_output_json = click.option("--output-json", type=click.Path(path_type=Path, dir_okay=False),
                            default=None, help="Write the results as JSON, too.")  # fmt: skip
_disable_tqdm = click.option("--disable-tqdm", is_flag=True, help="Show no progress bar.")


@click.group()
def bench() -> None:
    """Measure throughput, latency, serving and start-up."""


@bench.command(cls=Command)
@_output_json
@_disable_tqdm
@engine_options
@dataset_options
@_number("--input-len", None, "random: the same as --random-input-len.")
@_number("--output-len", None, "random: the same as --random-output-len.")
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
    llm = LLM(**{**dataclasses.asdict(config), "max_waiting": waiting})
    info = llm.model_info
    workload = _build_workload(dataset, info.vocab_size, info.eos_token_ids)
    require_room(workload.items, info.max_model_len)
    result = measure_throughput(llm, workload.items, progress=not disable_tqdm)
    click.echo(str(result))
    _write_json(output_json, result.to_dict())


@bench.command(cls=Command)
@_number("--input-len", 32, "Tokens per prompt.")
@_number("--output-len", 128, "Tokens per answer.")
@_number("--batch-size", 8, "Prompts in the batch.")
@_number("--num-iters-warmup", 10, "Iterations that are not timed.")
@_number("--num-iters", 30, "Iterations that are.")
@_output_json
@_disable_tqdm
@engine_options
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
    llm = LLM(**dataclasses.asdict(config))
    info = llm.model_info
    workload = _build_workload(spec, info.vocab_size, info.eos_token_ids)
    require_room(workload.items, info.max_model_len)
    result = measure_latency(
        llm, workload.items, num_iters=num_iters, num_iters_warmup=num_iters_warmup,
        progress=not disable_tqdm,
    )  # fmt: skip
    click.echo(str(result))
    _write_json(output_json, result.to_dict())


@bench.command(cls=Command)
@click.option("--host", default="127.0.0.1", show_default=True, help="The server's host.")
@_number("--port", 50051, "The server's gRPC port.")
@click.option("--model", default="", help="The model to ask for (default: what is served).")
@_number("--request-rate", None,
         "Requests per second; inf sends all at once (default: a trace's own times, else inf).",
         float)  # fmt: skip
@_number("--burstiness", 1.0,
         "Shape of the gamma-distributed gaps: 1 is a Poisson process, less is burstier.",
         float)  # fmt: skip
@_number("--max-concurrency", None, "Requests under way at once, at most.",
         click.IntRange(min=1))  # fmt: skip
@_number("--seed", 0, "Seed of prompts and arrivals.")
@_number("--temperature", 0.0, "Of the sampling; 0 is greedy.", float)
@click.option("--ignore-eos/--no-ignore-eos", default=True, show_default=True,
              help="Generate on past end-of-sequence tokens.")  # fmt: skip
@_number("--num-warmups", 0, "Requests sent first and not measured.", click.IntRange(min=0))
@_number("--ready-check-timeout-sec", 60.0, "How long to wait for the server.", float)
@click.option("--percentile-metrics", default="ttft,tpot,itl,e2el", show_default=True,
              help="Metrics to report.")  # fmt: skip
@click.option("--metric-percentiles", type=NumberList(float), default=(90.0, 99.0),
              show_default="90,99", help="Percentiles to report.")  # fmt: skip
@click.option("--save-result", is_flag=True, help="Write the results to a JSON file.")
@click.option("--save-detailed", is_flag=True, help="With every request's figures and text.")
@click.option("--result-dir", type=click.Path(path_type=Path, file_okay=False), default=None,
              help="Where to (default: the current directory).")  # fmt: skip
@click.option("--result-filename", default=None, help="Its name (default: made up).")
@_disable_tqdm
@dataset_options
def serve(dataset: "WorkloadSpec", **options: Any) -> None:
    """Drive a running gRPC server and report its latencies and throughput."""
    import asyncio

    asyncio.run(_serve(dataset, options))


async def _serve(dataset: "WorkloadSpec", options: dict[str, Any]) -> None:
    from jaxserve.bench import load

    rate, limit = options["request_rate"], options["max_concurrency"]
    progress = not options["disable_tqdm"]
    async with load.connect(
        f"{options['host']}:{options['port']}",
        model=options["model"],
        ignore_eos=options["ignore_eos"],
        temperature=options["temperature"],
    ) as client:
        info = await client.model_info(options["ready_check_timeout_sec"])
        workload = _build_workload(dataset, info.vocab_size, tuple(info.eos_token_ids))
        arrivals = load.arrival_times(workload.items, rate, options["burstiness"], dataset.seed)
        if options["num_warmups"]:
            warmups = [workload.items[0]] * options["num_warmups"]
            await load.run_load(warmups, arrivals[:1].repeat(len(warmups)) * 0, client.send,
                                max_concurrency=limit, progress=progress)  # fmt: skip
        result = await load.run_load(
            workload.items, arrivals, client.send, max_concurrency=limit, progress=progress
        )
    default_rate = "inf" if workload.items[0].arrival is None else "trace"
    _report(result, info.name, default_rate, options)


def _report(result: "LoadResult", model: str, default_rate: str, options: dict[str, Any]) -> None:
    import collections
    import datetime

    from jaxserve.bench import report

    metrics = tuple(options["percentile_metrics"].split(","))
    percentiles = options["metric_percentiles"]
    rate, limit = options["request_rate"], options["max_concurrency"]
    summary = report.summarize(result, metrics=metrics, percentiles=percentiles)
    click.echo(
        report.format_report(
            summary, metrics=metrics, percentiles=percentiles, request_rate=rate,
            max_concurrency=limit,
        )
    )  # fmt: skip
    errors = collections.Counter(r.error for r in result.records if r.error)
    for error, count in errors.most_common(5):
        click.echo(f"{count} x {error}", err=True)
    if options["save_result"] or options["save_detailed"]:
        fields = {
            "backend": "jaxserve",
            "model_id": model,
            "num_prompts": len(result.records),
            "request_rate": str(rate or default_rate),
            "burstiness": options["burstiness"],
            "max_concurrency": limit,
            **summary,
            **(report.detailed(result) if options["save_detailed"] else {}),
        }
        path = report.save_result(
            fields,
            directory=options["result_dir"],
            filename=options["result_filename"],
            now=datetime.datetime.now(),
        )
        click.echo(f"Saved {path}")


@bench.command(cls=Command)
@_number("--num-iters-cold", 3, "Starts with an empty compilation cache.")
@_number("--num-iters-warm", 3, "Starts with a filled one.")
@_number("--num-iters", None, "Sets both.")
@_number("--timeout", 600.0, "Seconds that one start may take.", float)
@_output_json
@_disable_tqdm
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
    _write_json(output_json, fields)


@bench.command(cls=Command)
@click.option("--concurrency", type=NumberList(int), default=(1, 8, 32), show_default="1,8,32",
              help="Prompts given to an engine at once.")  # fmt: skip
@_number("--input-len", 128, "Tokens per prompt.")
@_number("--output-len", 64, "Tokens per answer.")
@_number("--threads", None, "CPU threads of every side (default: all CPUs).")
@_number("--repeats", 3, "Timed runs; their median counts.")
@click.option("--sides", default="jaxserve,transformers,llama.cpp", show_default=True,
              help="Which engines to run.")  # fmt: skip
@click.option("--peer-python", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              default=None, help="Interpreter that has the peers installed.")  # fmt: skip
@_output_json
@_disable_tqdm
@engine_options(include=("model", "seed", "compilation_cache_dir", "page_size",
                         "max_num_batched_tokens", "overlap"))  # fmt: skip
def peers(
    config: EngineConfig,
    concurrency: tuple[int, ...],
    input_len: int,
    output_len: int,
    threads: int | None,
    repeats: int,
    sides: str,
    peer_python: Path | None,
    output_json: Path | None,
    disable_tqdm: bool,
) -> None:
    """Compare with transformers and llama.cpp on this machine's CPU, in float32.

    MODEL is a GGUF file or the name of a demo model.
    """
    from jaxserve.bench.peers.compare import CompareSpec

    spec = CompareSpec(
        concurrency=concurrency,
        input_len=input_len,
        output_len=output_len,
        threads=threads or _num_cpus(),
        repeats=repeats,
        seed=config.seed,
    )
    _peers(config, spec, tuple(sides.split(",")), peer_python, output_json, not disable_tqdm)


def _num_cpus() -> int:
    """CPUs that this process may run on."""
    import os

    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _peers(
    config: EngineConfig,
    spec: "CompareSpec",
    sides: tuple[str, ...],
    peer_python: Path | None,
    output_json: Path | None,
    progress: bool,
) -> None:
    from jaxserve.bench.peers import compare
    from jaxserve.checkpoints.load import open_checkpoint
    from jaxserve.checkpoints.pull import default_cache_dir, pull

    if unknown := set(sides) - set(compare.SIDES):
        raise click.UsageError(f"unknown sides {sorted(unknown)}; there are {[*compare.SIDES]}")
    source = Path(config.model)
    if not source.exists():
        source = pull(config.model)
    if source.suffix != ".gguf":
        raise click.UsageError(f"{source} is not a GGUF file, which all sides can read")
    model = compare.f32_model(source, default_cache_dir().parent / "peers")
    architecture = open_checkpoint(model).config
    before = compare.measure_machine(spec.threads)
    results = compare.compare(
        model, architecture, spec, sides=sides, peer_python=peer_python, progress=progress,
        jaxserve_options={
            name: getattr(config, name)
            for name in ("compilation_cache_dir", "page_size", "max_num_batched_tokens", "overlap")
        },
    )  # fmt: skip
    machine = before.better(compare.measure_machine(spec.threads))
    bounds = compare.bounds(architecture, machine, spec)
    click.echo(compare.format_table(results, bounds, spec))
    click.echo("\n" + compare.format_notes(results, spec, machine))
    _write_json(output_json, {
        "machine": vars(machine),
        "bound": bounds,
        "results": {name: {"version": r.version, "output_throughput": r.throughput,
                           "missing": r.missing, "error": r.error}
                    for name, r in results.items()},
    })  # fmt: skip
