"""Compiles the programs of a step for devices that are somewhere else, and says what they take.

The compilers of TPUs and GPUs need no device: JAX hands out abstract ones (`parallel.chips`,
`jax.experimental.topologies`). No array is ever made here, so a model of any size can be
compiled on a laptop, and the programs are the ones that the server runs.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

from jaxserve.models.config import ModelConfig
from jaxserve.models.graph import ModelGraph
from jaxserve.models.shard import shard_model
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.step_program import StepProgram


class StepBytes(NamedTuple):
    """Memory that a step takes on each device, in bytes.

    Attributes:
        weights: as many as there are in the model's shapes.
        kv_pages: likewise, the KV pool.
        padding: what the device's layouts add to both.
        temporaries: of the program that needs most, its outputs included.
    """

    weights: int
    kv_pages: int
    padding: int
    temporaries: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class CompiledStep(NamedTuple):
    """The programs of one model on one mesh.

    Attributes:
        backbones: by token bucket.
        samplers: by bucket of rows.
        bytes: what they take on each device.
    """

    backbones: dict[int, Compiled]
    samplers: dict[int, Compiled]
    bytes: StepBytes


def lower_step(
    config: ModelConfig,
    mesh: Mesh,
    *,
    buckets: Buckets,
    dtype: np.dtype,
    kv_dtype: np.dtype,
    num_pages: int,
    page_size: int,
    implementation: str,
) -> StepLowering:
    """The step of a model on a mesh, ready to be lowered.

    Args:
        config: the model, as its checkpoint or preset describes it.
        mesh: of axes (data, tensor), over devices that need not be there.
        buckets: shapes of one data shard's part of a step.
        dtype: type of weights and activations.
        kv_dtype: type of the values in the KV pool; 8 bits have scales.
        num_pages: pages of the KV pool, over all data shards.
        page_size: tokens per page.
        implementation: of attention; "auto" would ask this machine, so name one.

    Raises:
        ValueError: the implementation is "auto".
    """
    if implementation == "auto":
        raise ValueError("attention 'auto' depends on the machine; name an implementation")
    config, rules = shard_model(config, mesh)
    program = StepProgram.of_graph(ModelGraph(config), rules, buckets, implementation)
    return StepLowering(program, dtype, num_pages, page_size, kv_dtype)


def compile_step(
    lowering: StepLowering,
    *,
    tokens: Iterable[int] | None = None,
    sampled: Iterable[int] | None = None,
) -> CompiledStep:
    """Compile a step's programs, and measure them.

    Args:
        lowering: from `lower_step`.
        tokens: the token buckets to compile; at least one, by default all.
        sampled: the row buckets to compile, by default all.

    Raises:
        jax.errors.JaxRuntimeError: a compiler refused; for TPUs also a program that does not
            fit the device's memory.
    """
    buckets = lowering.program.buckets
    tokens = buckets.tokens if tokens is None else tokens
    sampled = buckets.sampled if sampled is None else sampled
    backbones = {n: lowering.backbone(n).compile() for n in tokens}
    samplers = {n: lowering.sampler(n).compile() for n in sampled}
    return CompiledStep(backbones, samplers, _bytes(lowering, backbones, samplers))


def _bytes(
    lowering: StepLowering, backbones: dict[int, Compiled], samplers: dict[int, Compiled]
) -> StepBytes:
    params = lowering.params
    weights = sum(map(bytes_per_device, params.values()))
    pool = jax.tree.leaves(lowering.kv_pages)
    kv_pages = sum(map(bytes_per_device, pool))
    num_tokens, backbone = next(iter(backbones.items()))
    # XLA drops the arguments that a program does not use.
    unused = {"lm_head"}
    inputs = [*pool, lowering.last_tokens, lowering.packed(num_tokens)]
    inputs += [param for name, param in params.items() if name not in unused]
    taken = _memory(backbone).argument_size_in_bytes
    temporaries = [
        memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        for memory in map(_memory, (*backbones.values(), *samplers.values()))
    ]
    padding = taken - sum(map(bytes_per_device, inputs))
    return StepBytes(weights, kv_pages, padding, max(temporaries))


def bytes_per_device(array: jax.ShapeDtypeStruct) -> int:
    """Bytes that one device holds of an array, without what its layout pads it with."""
    assert array.sharding is not None
    shape = array.sharding.shard_shape(array.shape)
    return math.prod(shape) * np.dtype(array.dtype).itemsize


def _memory(compiled: Compiled) -> Any:
    memory = compiled.memory_analysis()
    assert memory is not None, "this compiler does not say what its programs take"
    return memory
