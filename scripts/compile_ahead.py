"""Compile all programs that a server of a model would run, for devices that need not be there.

    python scripts/compile_ahead.py llama-3.1-8b v5e:2x2 --quantization int8
    python scripts/compile_ahead.py llama-3.3-70b v5e:2x4 --tensor 8 --quantization int4
    python scripts/compile_ahead.py qwen3-32b h100 --quantization fp8

From a checkout, with `.venv-aot`'s Python and JAX_PLATFORMS=cpu. The model is a preset, the device
a TPU slice or an H100. Prints each program with the seconds that lowering and compiling it took and
the collectives in it, and what the step takes on each device; `--only` compiles those programs
whose names match.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxserve.checkpoints.storage import named
from jaxserve.models.config_readers import from_preset
from jaxserve.models.registry import parameters_of
from jaxserve.models.shard import shard_model
from jaxserve.parallel.chips import abstract_tpu_devices, hbm_bytes
from jaxserve.parallel.mesh import bytes_per_device, make_mesh
from jaxserve.runner.ahead_of_time import compile_step, lower_step
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.collectives import collectives
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.step_jobs import step_jobs
from tests.aot.gpu import h100_topology

GIB = 2**30
PAGE_SIZE, MAX_ROWS, MAX_TOKENS, MAX_MODEL_LEN = 64, 64, 512, 8192  # a server's defaults
FREE_SHARE = 0.9  # of what weights leave of a device's memory: the pool, as a server makes it


def main() -> None:
    """Compile, and print a line for each program and one for memory."""
    args = _arguments()
    lowering = lowered(args)
    needed, rest = step_jobs(lowering, stores=False, copies=True)
    jobs = {**needed, **rest}
    chosen = {name: job for name, job in jobs.items() if re.search(args.only, name)}
    print(f"{len(lowering.program.spans)} spans, {len(jobs)} programs", flush=True)
    compiled = compile_step(lowering, chosen)
    for name, seconds in compiled.seconds.items():
        moved = Counter((c.kind, c.dtype) for c in collectives(compiled.programs[name]))
        found = ", ".join(f"{n} {kind} {dtype}" for (kind, dtype), n in moved.items())
        print(f"{name:20} {seconds:7.1f} s  {found}")
    used, has = compiled.bytes, hbm_bytes(lowering.rules.mesh.devices.flat[0])
    print(f"{sum(compiled.seconds.values()):.0f} s for {len(chosen)} programs")
    print(
        f"GiB per device: weights {used.weights / GIB:.2f}, {lowering.num_pages} KV pages "
        f"{used.kv_pages / GIB:.2f}, padding {used.padding / GIB:.2f}, temporaries "
        f"{used.temporaries / GIB:.2f}: {used.total / GIB:.2f} of {has / GIB:.0f}"
    )


def lowered(args: argparse.Namespace) -> StepLowering:
    """The step of the model with a pool as large as the device has room for."""
    is_gpu = args.device == "h100"
    devices = h100_topology().devices if is_gpu else abstract_tpu_devices(args.device)
    mesh = make_mesh(f"tensor={args.tensor}", devices)
    config = from_preset(args.model)
    if args.layers:
        config = config.layers(0, args.layers)
    bfloat16 = jnp.dtype("bfloat16")

    def with_pages(num_pages: int) -> StepLowering:
        return lower_step(
            config,
            mesh,
            buckets=Buckets.for_limits(
                max_tokens=MAX_TOKENS, max_rows=MAX_ROWS, max_model_len=MAX_MODEL_LEN,
                page_size=PAGE_SIZE,
            ),
            dtype=bfloat16,
            kv_dtype=bfloat16,
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            implementation="gpu" if is_gpu else "tpu",
            storage={} if args.quantization == "none" else named(
                args.quantization, parameters_of(config), shard_model(config, mesh)[1]
            ),
            num_spans=args.num_spans,
        )  # fmt: skip

    empty = with_pages(1)
    left = hbm_bytes(mesh.devices.flat[0]) - bytes_per_device(empty.params)
    most = MAX_ROWS * MAX_MODEL_LEN // PAGE_SIZE
    return with_pages(args.num_pages or min(most, int(left * FREE_SHARE / empty.page_bytes)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a preset")
    parser.add_argument("device", help="h100, or a TPU slice such as v5e:2x4")
    parser.add_argument("--tensor", type=int, default=1, help="devices that share the model")
    parser.add_argument("--quantization", default="none", help="none, int8, int4 or fp8")
    parser.add_argument("--num-spans", type=int, help="default: as a server chooses")
    parser.add_argument("--num-pages", type=int, help="default: as many as there is room for")
    parser.add_argument("--layers", type=int, help="of the model's; default: all")
    parser.add_argument("--only", default="", help="regular expression of programs' names")
    return parser.parse_args()


if __name__ == "__main__":
    main()
