"""What differs between JAX releases, and what a kernel asks about the device it is traced for."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

_JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])


def _mosaic_gpu() -> Any:
    """JAX's Mosaic GPU, which takes a third of a second to import: only where a GPU's is traced."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def transpose_ref(ref: Any) -> Any:
    """The transposed view of a 2-D Ref of a Mosaic GPU kernel; nothing moves."""
    if _JAX_VERSION >= (0, 11):
        return ref.transpose((1, 0))
    return _mosaic_gpu().transpose_ref(ref, (1, 0))


def load_ref(ref: Any, layout: Any, optimized: bool = True) -> jax.Array:
    """A Ref's values in registers, laid out as asked; `optimized` refuses bank conflicts."""
    plgpu = _mosaic_gpu()
    if _JAX_VERSION >= (0, 11):
        return plgpu.load(ref, layout=layout, optimized=optimized)  # type: ignore[call-arg]
    return plgpu.load(ref, (), layout=layout, optimized=optimized)


def mosaic_gpu_kernel(
    body: Callable[..., None],
    *,
    out_type: Any,
    scratch_types: Sequence[Any],
    grid: int,
    num_threads: int | None = None,
    name: str,
) -> Callable[..., Any]:
    """A Mosaic GPU kernel on a grid of one axis, "block", and warpgroups, "warpgroup".

    It is `plgpu.kernel` without its batching rule, under which JAX 0.10 takes no Refs as
    operands. "Lane" semantics are the ones in which 0.10 and 0.11 both lower the kernels here.

    Args:
        body: takes the operands' Refs, the outputs' and the scratch ones.
        out_type: `jax.ShapeDtypeStruct`s of the outputs.
        scratch_types: shared memory and barriers.
        grid: number of thread blocks.
        num_threads: warpgroups of a block; None is one, without an axis.
        name: of the kernel in profiles.
    """
    thread_name = None if num_threads is None else "warpgroup"
    from jax.experimental import pallas as pl

    plgpu = _mosaic_gpu()
    mesh = plgpu.Mesh(
        grid=(grid,), grid_names=("block",), num_threads=num_threads, thread_name=thread_name
    )

    def with_scratch(*refs: Any) -> None:
        pl.run_scoped(
            functools.partial(body, *refs),
            *scratch_types,
            collective_axes=thread_name or (),
        )

    params = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
    return pl.kernel(with_scratch, out_type=out_type, mesh=mesh, compiler_params=params, name=name)


def _traced_device() -> Any:
    """The device that is traced for.

    An abstract mesh with a device (compiling ahead of time, for one that is not there) goes before
    the default backend.
    """
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def gpu_kind() -> str | None:
    """The kind of GPU that is traced for ("NVIDIA H100 80GB HBM3"), or None where it is none."""
    device = _traced_device()
    return device.device_kind if device.platform in ("gpu", "cuda") else None


def gpu_core_count() -> int:
    """Streaming multiprocessors of the GPU that is traced for; 1 where that is unknown."""
    # An abstract device may not know, and calls num_cores what is a real one's core_count.
    known = getattr(_traced_device(), "num_cores", None)
    return known or getattr(jax.devices()[0], "core_count", 1)


def tpu_kind() -> str | None:
    """The kind of TPU that is traced for ("TPU v5 lite"), or None where it is none."""
    kind = _traced_device().device_kind
    return kind if kind.startswith("TPU") else None


def tpu_core_count() -> int:
    """TensorCores of the device that is traced for; two where a chip is one device (v4, v5p)."""
    return (tpu_kind() and getattr(_traced_device(), "num_cores", None)) or 1
