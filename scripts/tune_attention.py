"""Find the fastest block sizes of the attention kernels, on a TPU or a Hopper GPU.

    python scripts/tune_attention.py [--shapes Llama-3.1-8B ...] [--page-sizes 16 64 128]

Times candidates around the heuristic's sizes on the decode and prefill workloads of
`pallas_kernels.bench` and writes the best into pallas_kernels/paged_attention/tuning.json, which
the kernels read; other entries stay. A TPU's sizes serve both workloads: the ones with the least
sum of (time / best time) win. A GPU has sizes of its own for each.
"""

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.bench import timing, workloads
from pallas_kernels.jax_compat import gpu_core_count, gpu_kind, tpu_kind
from pallas_kernels.paged_attention import Shape, choose_implementation, gpu, tpu, tuning, xla
from pallas_kernels.paged_attention.gpu_tiles import MAX_WARPGROUPS, GpuTiles, gpu_tiles
from pallas_kernels.shapes import MODELS, model_shape

MAX_ERROR = 0.02  # two roundings to bfloat16; float32 on a TPU is multiplied in bfloat16 too
SMEM_BYTES = 227 * 1024  # of a Hopper multiprocessor, as one thread block can have it
Candidate = TypeVar("Candidate", bound=Hashable)


def best_candidate(times: Mapping[Candidate, Mapping[str, float]]) -> Candidate:
    """The candidate with the least sum, over workloads, of its time by the best time.

    Args:
        times: seconds by candidate and workload; candidates without a workload are out.

    Raises:
        ValueError: no candidate has all workloads.
    """
    names = {name for row in times.values() for name in row}
    whole = {key: row for key, row in times.items() if names and set(row) == names}
    if not whole:
        raise ValueError("no block sizes ran on every workload")
    best = {name: min(row[name] for row in whole.values()) for name in names}
    return min(whole, key=lambda key: sum(whole[key][name] / best[name] for name in names))


def tpu_candidates(chip: str, shape: Shape) -> list[tuning.BlockSizes]:
    """Sizes of half, once and twice the heuristic's that fit in vector memory."""
    around = [(max(n // 2, 1), n, 2 * n) for n in tuning.heuristic(chip, shape)]
    limit = tuning.vmem_limit(chip) or tuning.DEFAULT_VMEM * tuning.MEBIBYTE
    sizes = (tuning.BlockSizes(*each) for each in itertools.product(*around))
    fit = (s for s in sizes if s.pages_per_block % s.pages_per_chunk == 0)
    return list(dict.fromkeys(s for s in fit if tuning.vmem_bytes(shape, s) <= limit))


def gpu_candidates(workload: str, shape: Shape, num_cores: int) -> list[GpuTiles]:
    """Sizes of one workload's kernel that fit in shared memory, the other's as they are."""
    start = gpu_tiles(shape.head_dim, num_cores)
    slot = 4 * shape.head_dim  # bytes of K and V of one position
    found = []
    if workload == "decode":
        for blocks, tile, stages, share in itertools.product(
            (1, 2, 3, 4), (64, 128), (2, 3, 4, 6), (2, 4, 8)
        ):
            if blocks * stages * tile * slot <= SMEM_BYTES:
                found.append(
                    dataclasses.replace(
                        start, decode_blocks=blocks * num_cores, decode_tile=tile,
                        decode_stages=stages, decode_share=share,
                    )
                )  # fmt: skip
    else:
        for blocks, tile, stages, groups in itertools.product(
            (1, 2), (64, 128), (2, 3, 4), range(1, MAX_WARPGROUPS + 1)
        ):
            # Queries, outputs and weights of every warpgroup, 64 rows each.
            own = groups * 64 * (slot + 2 * tile)
            memory = blocks * (own + stages * tile * slot)
            # The registers are for two warpgroups: blocks beyond would only wait.
            if memory <= SMEM_BYTES and blocks * groups <= MAX_WARPGROUPS:
                found.append(
                    dataclasses.replace(
                        start, prefill_blocks=blocks * num_cores, prefill_tile=tile,
                        prefill_stages=stages, prefill_warpgroups=groups,
                    )
                )  # fmt: skip
    return [tiles for tiles in found if gpu.refusal(shape, tiles) is None]


def check(out: jax.Array, expected: jax.Array) -> None:
    """Refuses block sizes that change results: [tokens, heads, head_dim] both."""
    out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
    error = float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))
    if not error < MAX_ERROR:
        raise ValueError(f"results differ from XLA's by {error:.2g}")


def measure(
    candidates: Sequence[Any], names: Sequence[str], shape: Shape, options: argparse.Namespace,
    attend_with: Callable[[Any], Callable[..., Any]],
) -> dict[Any, dict[str, float]]:  # fmt: skip
    """Seconds of every candidate on every workload; printed as they come.

    Args:
        candidates: block sizes.
        names: of workloads.
        shape: of queries and pool.
        options: the command line's.
        attend_with: makes (q, kv_pages, batch) -> out of a candidate.
    """
    times: dict[Any, dict[str, float]] = {candidate: {} for candidate in candidates}
    for name in names:
        workload = workloads.make_workload(name, options.batch, options.context)
        inputs = workloads.make_inputs(workload, shape)
        attend = functools.partial(xla.paged_attention, layer=0, scale=shape.head_dim**-0.5)
        expected = jax.jit(attend)(inputs.q, inputs.kv_pages, inputs.batch)
        for candidate in candidates:
            try:
                call = attend_with(candidate)
                check(jax.jit(call)(inputs.q, inputs.kv_pages, inputs.batch), expected)
                seconds = timing.time_attention(call, inputs, repeats=options.repeats)
            except Exception as error:  # what a compiler refuses is no candidate
                print(f"  {name:<8}   does not run  {candidate}: {str(error).splitlines()[:1]}")
                continue
            times[candidate][name] = seconds
            print(f"  {name:<8}{seconds * 1e6:>12.1f} us  {candidate}", flush=True)
    return times


def tune(shape: Shape, options: argparse.Namespace) -> dict[str, int]:
    """The fields of the table's entry for a shape on this device."""
    scale = shape.head_dim**-0.5
    if (chip := tpu_kind()) is not None:

        def on_tpu(sizes: tuning.BlockSizes) -> Callable[..., Any]:
            return functools.partial(tpu.paged_attention, layer=0, scale=scale, block_sizes=sizes)

        candidates = tpu_candidates(chip, shape)
        times = measure(candidates, ("decode", "prefill"), shape, options, on_tpu)
        return best_candidate(times)._asdict()

    def on_gpu(tiles: GpuTiles) -> Callable[..., Any]:
        return functools.partial(gpu.paged_attention, layer=0, scale=scale, tiles=tiles)

    entry: dict[str, int] = {}
    for name in ("decode", "prefill"):
        candidates = gpu_candidates(name, shape, gpu_core_count())
        best = best_candidate(measure(candidates, (name,), shape, options, on_gpu))
        fields = dataclasses.asdict(best).items()
        entry |= {field: size for field, size in fields if field.startswith(name)}
    return entry


def write_entries(table: Path, entries: Mapping[str, Mapping[str, int]]) -> None:
    """Adds entries to a table, or replaces them; the others stay."""
    merged = json.loads(table.read_text()) | entries
    table.write_text(json.dumps(merged, indent=2, sort_keys=True) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--page-sizes", nargs="+", type=int, default=[16, 64, 128])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--batch", type=int, help="rows; default: as in pallas_kernels.bench")
    parser.add_argument("--context", type=int, default=workloads.CONTEXT)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    device, chip = jax.devices()[0], tpu_kind() or gpu_kind()
    if chip is None:
        raise SystemExit(
            f"tune_attention takes a TPU or a Hopper GPU, and this machine has {device.platform} "
            "only; kernels without an entry in tuning.json use a heuristic's sizes"
        )
    kernel = "tpu" if tpu_kind() is not None else "gpu"
    for model, page_size in itertools.product(options.shapes, options.page_sizes):
        shape = model_shape(model, page_size, options.dtype)
        try:
            choose_implementation(kernel, device, shape)
        except ValueError as error:
            print(f"{model}, pages of {page_size}: {error}")
            continue
        print(f"{model}, pages of {page_size}:")
        entry = tune(shape, options)
        print(f"  best: {entry}")
        write_entries(tuning.TABLE, {tuning.key(chip, shape): entry})


if __name__ == "__main__":
    main()
