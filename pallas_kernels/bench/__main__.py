"""Times paged attention and KV writes against what the device could do, and against peers.

    python -m pallas_kernels.bench --workloads decode --shapes Llama-3.1-8B --json results.json

Every time is the median of several timings after warm-up, each of as many calls as hide the
start of a program. The bound is the larger of the bytes that a call needs by a copy's bandwidth
and its FLOPs by the rate of a large matrix product, both measured in the same run. Where K and V
fit in a cache (CPUs, small sizes) a call can be faster than its bound.
"""

import argparse
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.bench import peers, timing, workloads
from pallas_kernels.bench.timing import Limits
from pallas_kernels.bench.workloads import Workload
from pallas_kernels.kv_pages import kv_dtype_name, kv_dtype_of
from pallas_kernels.kv_write import kv_write
from pallas_kernels.paged_attention import Shape, choose_implementation, paged_attention
from pallas_kernels.paged_attention.choice import NAMES
from pallas_kernels.shapes import MODELS, model_shape

ROW = "{:<14}{:>12}{:>12}{:>14}{:>9}{:>13}{:>10}"
HEADER = ("implementation", "MB", "GFLOP", "bound (us)", "of", "time (us)", "fraction")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=MODELS, default=["Llama-3.1-8B"])
    parser.add_argument(
        "--workloads", nargs="+", choices=workloads.NAMES, default=list(workloads.NAMES)
    )
    defaults = ", ".join(f"{name} {rows}" for name, rows in workloads.BATCH.items())
    parser.add_argument("--batch", type=int, help=f"rows, the chunk aside (default: {defaults})")
    parser.add_argument("--context", type=int, default=workloads.CONTEXT, help="tokens of a row")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--kv-dtype", choices=["bfloat16", "float16", "float32", "int8", "fp8"],
        help="type of the pool (default: --dtype)",
    )  # fmt: skip
    parser.add_argument(
        "--implementations", nargs="+", choices=NAMES[1:],
        help="default: XLA and every kernel that can run on this device",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=10, help="timings; the median counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for.

    Args:
        arguments: of the command line; None takes the process's own.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    counts = options.batch, options.context, options.page_size, options.repeats
    if any(count is not None and count < 1 for count in counts):
        parser.error("--batch, --context, --page-size and --repeats must be positive")
    device = jax.devices()[0]
    kv_dtype = kv_dtype_of(options.kv_dtype or options.dtype)
    shapes = {
        name: model_shape(name, options.page_size, kv_dtype, options.dtype)
        for name in options.shapes
    }
    for shape in shapes.values():  # before anything is timed
        for name in options.implementations or ():
            try:
                choose_implementation(name, device, shape)
            except ValueError as error:
                parser.error(str(error))

    limits = timing.measure_limits(options.dtype, repeats=options.repeats)
    report: dict[str, Any] = {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "dtype": options.dtype,
        "kv_dtype": kv_dtype_name(kv_dtype),
        "page_size": options.page_size,
        "copy_bytes_per_s": limits.bandwidth,
        "matmul_flops_per_s": limits.rate,
        "results": [],
        "left_out": [],
    }
    print(timing.describe(limits, options.dtype))
    for model, shape in shapes.items():
        for name in options.workloads:
            workload = workloads.make_workload(name, options.batch, options.context)
            measured = _measure(workload, shape, options.implementations, options.repeats)
            _report(report, model, workload, shape, limits, measured)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _measure(
    workload: Workload, shape: Shape, named: Sequence[str] | None, repeats: int
) -> dict[str, float | str]:
    """Seconds of every implementation and peer, or why it was left out."""
    inputs = workloads.make_inputs(workload, shape)
    measured: dict[str, float | str] = {}
    kernels = ("tpu", "gpu", "xla") if workload.name == "kv_write" else ("tpu", "gpu", "cpu", "xla")
    for name in named or kernels:
        try:
            choose_implementation(name, jax.devices()[0], shape)
            measured[name] = _time(name, workload, inputs, shape, repeats)
        except ValueError as error:
            measured[name] = str(error)
    del inputs  # peers need the memory
    if shape.query_dtype not in (None, shape.dtype):
        return measured  # peers have one type for both
    return measured | peers.time_peers(workload, shape, repeats=repeats)


def _time(
    name: str, workload: Workload, inputs: workloads.Inputs, shape: Shape, repeats: int
) -> float:
    """Seconds of one implementation's call."""
    if workload.name == "kv_write":
        write = functools.partial(kv_write, layer=0, implementation=name)
        return timing.time_kv_write(write, inputs, repeats=repeats)
    scale = shape.head_dim**-0.5
    attend = functools.partial(paged_attention, layer=0, scale=scale, implementation=name)
    return timing.time_attention(attend, inputs, repeats=repeats)


def _report(
    report: dict[str, Any], model: str, workload: Workload, shape: Shape, limits: Limits,
    measured: dict[str, float | str],
) -> None:  # fmt: skip
    """Prints a workload's table and adds it to the report."""
    work = workloads.work_of(workload, shape)
    bound, of = work.bound(*limits)
    context = workload.rows[0][1]
    about = {
        "model": model,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "workload": workload.name,
        "rows": len(workload.rows),
        "tokens": workload.num_tokens,
        "context": context,
    }
    print(
        f"\n{model} ({shape.heads}/{shape.kv_heads} heads of {shape.head_dim}), {workload.name}: "
        f"{len(workload.rows)} rows, {workload.num_tokens} tokens, context {context}"
    )
    print(ROW.format(*HEADER))
    for name, seconds in measured.items():
        if isinstance(seconds, str):
            report["left_out"].append({**about, "implementation": name, "reason": seconds})
            continue
        report["results"].append({
            **about, "implementation": name, "bytes": work.bytes, "flops": work.flops,
            "bound_s": bound, "bound_of": of, "time_s": seconds, "fraction": bound / seconds,
        })  # fmt: skip
        cells = f"{work.bytes / 1e6:.4g}", f"{work.flops / 1e9:.4g}", f"{bound * 1e6:.4g}", of
        print(ROW.format(name, *cells, f"{seconds * 1e6:.4g}", f"{bound / seconds:.2f}"))
    for name, reason in measured.items():
        if isinstance(reason, str):
            print(f"  {name} left out: {reason}")


if __name__ == "__main__":
    # PyTorch, if it is here, needs memory of the same GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    main()
