"""`jaxserve bench peers`: other engines beside this one."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from jaxserve.cli.bench_options import (
    NumberList,
    disable_tqdm_option,
    number,
    output_json_option,
    write_json,
)
from jaxserve.cli.options import Command, engine_options
from jaxserve.core.config import EngineConfig

if TYPE_CHECKING:
    from jaxserve.bench.peers.compare import CompareSpec


@click.command(cls=Command)
@click.option("--concurrency", type=NumberList(int), default=(1, 8, 32), show_default="1,8,32",
              help="Prompts given to an engine at once.")  # fmt: skip
@number("--input-len", 128, "Tokens per prompt.")
@number("--output-len", 64, "Tokens per answer.")
@number("--threads", None, "CPU threads of every side (default: all CPUs).")
@number("--repeats", 3, "Timed runs; their median counts.")
@click.option("--sides", default="jaxserve,transformers,llama.cpp", show_default=True,
              help="Which engines to run.")  # fmt: skip
@click.option("--peer-python", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              default=None, help="Interpreter that has the peers installed.")  # fmt: skip
@output_json_option
@disable_tqdm_option
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
    write_json(output_json, {
        "machine": vars(machine),
        "bound": bounds,
        "results": {name: {"version": r.version, "output_throughput": r.throughput,
                           "missing": r.missing, "error": r.error}
                    for name, r in results.items()},
    })  # fmt: skip
