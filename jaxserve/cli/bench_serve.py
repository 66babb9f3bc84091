"""`jaxserve bench serve`: a running gRPC server under load."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxserve.cli.bench_options import (
    NumberList,
    build_workload,
    dataset_options,
    disable_tqdm_option,
    number,
)
from jaxserve.cli.options import Command

if TYPE_CHECKING:
    from jaxserve.bench.load import LoadResult
    from jaxserve.bench.workloads import WorkloadSpec


@click.command(cls=Command)
@click.option("--host", default="127.0.0.1", show_default=True, help="The server's host.")
@number("--port", 50051, "The server's gRPC port.")
@click.option("--model", default="", help="The model to ask for (default: what is served).")
@number("--request-rate", None,
         "Requests per second; inf sends all at once (default: a trace's own times, else inf).",
         float)  # fmt: skip
@number("--burstiness", 1.0,
         "Shape of the gamma-distributed gaps: 1 is a Poisson process, less is burstier.",
         float)  # fmt: skip
@number("--max-concurrency", None, "Requests under way at once, at most.",
         click.IntRange(min=1))  # fmt: skip
@number("--seed", 0, "Seed of prompts and arrivals.")
@number("--temperature", 0.0, "Of the sampling; 0 is greedy.", float)
@click.option("--ignore-eos/--no-ignore-eos", default=True, show_default=True,
              help="Generate on past end-of-sequence tokens.")  # fmt: skip
@number("--num-warmups", 0, "Requests sent first and not measured.", click.IntRange(min=0))
@number("--ready-check-timeout-sec", 60.0, "How long to wait for the server.", float)
@click.option("--percentile-metrics", default="ttft,tpot,itl,e2el", show_default=True,
              help="Metrics to report.")  # fmt: skip
@click.option("--metric-percentiles", type=NumberList(float), default=(90.0, 99.0),
              show_default="90,99", help="Percentiles to report.")  # fmt: skip
@click.option("--save-result", is_flag=True, help="Write the results to a JSON file.")
@click.option("--save-detailed", is_flag=True, help="With every request's figures and text.")
@click.option("--result-dir", type=click.Path(path_type=Path, file_okay=False), default=None,
              help="Where to (default: the current directory).")  # fmt: skip
@click.option("--result-filename", default=None, help="Its name (default: made up).")
@disable_tqdm_option
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
        workload = build_workload(dataset, info.vocab_size, tuple(info.eos_token_ids))
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
