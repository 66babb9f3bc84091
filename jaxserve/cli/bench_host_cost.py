"""`jaxserve bench host-cost`: what the host does per step, and the step it hides behind."""

from pathlib import Path

import click

from jaxserve.cli.bench_options import NumberList, number, output_json_option, write_json
from jaxserve.cli.options import Command, engine_options
from jaxserve.core.config import EngineConfig

CONTEXT_LEN = 128  # of the device's rows: 256 of them fit the default pool of a CPU


@click.command("host-cost", cls=Command)
@click.option("--policies", default="", show_default="all", help="With commas between.")
@click.option("--waiting", type=NumberList(int), default=(100, 1000, 10_000),
              show_default="100,1000,10000", help="Requests in the queue all along.")  # fmt: skip
@number("--running", 256, "Requests that decode at the same time.")
@number("--input-len", 400, "Tokens per prompt.")
@number("--output-len", 512, "Tokens per answer.")
@number("--num-steps", 300, "Steps that are timed.")
@number("--step-ms", None, "The device's time per step (default: measured on MODEL).", float)
@output_json_option
@engine_options(include=("model", "seed", "page_size", "compilation_cache_dir", "dtype",
                         "random_weights"), model_required=False)  # fmt: skip
def host_cost(
    config: EngineConfig,
    policies: str,
    waiting: tuple[int, ...],
    running: int,
    input_len: int,
    output_len: int,
    num_steps: int,
    step_ms: float | None,
    output_json: Path | None,
) -> None:
    """Host time per step (plan, pack, commit) by policy and requests waiting."""
    from jaxserve.bench.host_cost import HostCostSpec, format_host_costs, measure_host_cost
    from jaxserve.scheduling.policies import POLICIES

    spec = HostCostSpec(
        num_running=running,
        prompt_len=input_len,
        output_len=output_len,
        page_size=config.page_size,
        num_steps=num_steps,
        seed=config.seed,
    )
    names = policies.split(",") if policies else sorted(POLICIES)
    costs = [measure_host_cost(name, count, spec) for name in names for count in waiting]
    step_seconds = _measured_step(config, running) if step_ms is None else step_ms / 1e3
    click.echo(format_host_costs(costs, spec, step_seconds))
    write_json(output_json, {
        "num_running": running,
        "step_ms": step_seconds * 1e3,
        "costs": [cost.to_dict() for cost in costs],
    })  # fmt: skip


def _measured_step(config: EngineConfig, num_rows: int) -> float:
    """Seconds of the model's decode step of so many rows."""
    import dataclasses

    from jaxserve.bench.step_time import measure_engine
    from jaxserve.engine.build import build_sync_engine

    config = dataclasses.replace(
        config,
        max_num_seqs=num_rows,
        max_num_batched_tokens=num_rows,
        max_model_len=CONTEXT_LEN,
        token_buckets=str(num_rows),  # the only program that is wanted
        row_buckets=str(num_rows),
    )
    engine = build_sync_engine(config)
    return measure_engine(engine, [num_rows], CONTEXT_LEN)[num_rows]
