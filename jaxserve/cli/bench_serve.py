"""`jaxserve bench serve`: a running gRPC server under load."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jaxserve.bench.load_settings import ServeSpec, WorkloadSpec
from jaxserve.cli.benchmark import disable_tqdm_option
from jaxserve.cli.options import Command, settings_options
from jaxserve.files.writable import require_writable

if TYPE_CHECKING:
    from jaxserve.bench.load import LoadResult


@click.command(cls=Command)
@disable_tqdm_option
@settings_options(ServeSpec)
@settings_options(WorkloadSpec, "dataset")
def serve(spec: ServeSpec, dataset: WorkloadSpec, disable_tqdm: bool) -> None:
    """Drive a running gRPC server and report its latencies and throughput."""
    import asyncio
    import dataclasses

    dataset = dataclasses.replace(dataset, seed=spec.seed)
    if spec.saves:
        # Without a name of its own it gets one that any folder takes.
        option = "--result-dir" if spec.result_filename is None else "--result-filename"
        name = spec.result_filename or f".jaxserve-{os.getpid()}.json"
        require_writable((spec.result_dir or Path()) / name, option)
    asyncio.run(_serve(spec, dataset, progress=not disable_tqdm))


async def _serve(spec: ServeSpec, dataset: WorkloadSpec, progress: bool) -> None:
    from jaxserve.bench import load
    from jaxserve.bench.workloads import build_workload

    limit = spec.max_concurrency
    async with load.connect(
        f"{spec.host}:{spec.port}",
        model=spec.model,
        ignore_eos=spec.ignore_eos,
        temperature=spec.temperature,
    ) as client:
        info = await client.model_info(spec.ready_check_timeout_sec)
        workload = build_workload(dataset, info.vocab_size, tuple(info.eos_token_ids))
        click.echo(str(workload))
        arrivals = load.arrival_times(
            workload.items, spec.request_rate, spec.burstiness, dataset.seed
        )
        if spec.num_warmups:
            warmups = [workload.items[0]] * spec.num_warmups
            await load.run_load(warmups, arrivals[:1].repeat(len(warmups)) * 0, client.send,
                                max_concurrency=limit, progress=progress)  # fmt: skip
        result = await load.run_load(
            workload.items, arrivals, client.send, max_concurrency=limit, progress=progress
        )
    _report(result, info.name, "inf" if workload.items[0].arrival is None else "trace", spec)


def _report(result: "LoadResult", model: str, default_rate: str, spec: ServeSpec) -> None:
    import collections
    import datetime

    from jaxserve.bench import report

    metrics, percentiles = spec.percentile_metrics, spec.metric_percentiles
    summary = report.summarize(result, metrics=metrics, percentiles=percentiles)
    click.echo(
        report.format_report(
            summary, metrics=metrics, percentiles=percentiles, request_rate=spec.request_rate,
            max_concurrency=spec.max_concurrency,
        )
    )  # fmt: skip
    errors = collections.Counter(r.error for r in result.records if r.error)
    for error, count in errors.most_common(5):
        click.echo(f"{count} x {error}", err=True)
    if spec.saves:
        fields = {
            "backend": "jaxserve",
            "model_id": model,
            "num_prompts": len(result.records),
            "request_rate": str(spec.request_rate or default_rate),
            "burstiness": spec.burstiness,
            "max_concurrency": spec.max_concurrency,
            **summary,
            **(report.detailed(result) if spec.save_detailed else {}),
        }
        path = report.save_result(
            fields,
            directory=spec.result_dir,
            filename=spec.result_filename,
            now=datetime.datetime.now(),
        )
        click.echo(f"Saved {path}")
