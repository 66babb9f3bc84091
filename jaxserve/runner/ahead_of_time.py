"""Compiles the programs of a step for devices that are somewhere else, and says what they take.

The compilers of TPUs and GPUs need no device: JAX hands out abstract ones (`parallel.chips`,
`jax.experimental.topologies`). No array is ever made here, so a model of any size can be
compiled on a laptop, and the programs are the ones that the server runs.
"""

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

from jaxserve.models.config import ModelConfig
from jaxserve.models.graph import ModelGraph
from jaxserve.models.shard import shard_model
from jaxserve.models.weights import Storage
from jaxserve.parallel.mesh import bytes_per_device
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.step_jobs import Job, span_name, whole_name
from jaxserve.runner.step_program import StepProgram


class StepBytes(NamedTuple):
    """Memory that a step takes on each device, in bytes.

    Attributes:
        weights: as many as there are in the model's shapes.
        kv_pages: likewise, the KV pool.
        padding: what the device's layouts add to both, as far as the backbone's programs tell.
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
    """Programs of one model on one mesh.

    Attributes:
        programs: by name.
        seconds: what lowering and compiling each of them took.
        bytes: what they take on each device.
    """

    programs: dict[str, Compiled]
    seconds: dict[str, float]
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
    storage: Mapping[str, Storage] = MappingProxyType({}),
    num_spans: int | None = None,
) -> StepLowering:
    """The step of a model on a mesh, ready to be lowered.

    Args:
        config: the model, as its checkpoint or preset describes it.
        mesh: of axes (data, tensor), over devices that need not be there.
        buckets: shapes of one data shard's part of a step.
        dtype: type of activations, and of weights that are not quantised.
        kv_dtype: type of the values in the KV pool; 8 bits have scales.
        num_pages: pages of the KV pool, over all data shards.
        page_size: tokens per page.
        implementation: of attention; "auto" would ask this machine, so name one.
        storage: how weights are held that are not arrays, by name.
        num_spans: into how many spans the layers are cut; None: as a server would.

    Raises:
        ValueError: the implementation is "auto", or there are fewer layers than spans.
    """
    if implementation == "auto":
        raise ValueError("attention 'auto' depends on the machine; name an implementation")
    config, rules = shard_model(config, mesh)
    graph = ModelGraph(config)
    weight_bytes = bytes_per_device(graph.abstract_params(rules, dtype, storage))
    program = StepProgram.of_graph(
        graph, rules, buckets, implementation, num_spans=num_spans, weight_bytes=weight_bytes
    )
    return StepLowering(program, dtype, num_pages, page_size, kv_dtype, storage)


def compile_step(lowering: StepLowering, jobs: Mapping[str, Job]) -> CompiledStep:
    """Compile programs of a step one after the other, and measure them.

    Args:
        lowering: from `lower_step`.
        jobs: what to compile, by name: all that a server runs (`step_jobs`) or some of it.

    Raises:
        jax.errors.JaxRuntimeError: a compiler refused; for TPUs also a program that does not
            fit the device's memory.
    """
    programs: dict[str, Compiled] = {}
    seconds: dict[str, float] = {}
    for name, job in jobs.items():
        began = time.monotonic()
        programs[name] = job().compile()
        seconds[name] = time.monotonic() - began
    return CompiledStep(programs, seconds, _bytes(lowering, programs))


def _bytes(lowering: StepLowering, programs: Mapping[str, Compiled]) -> StepBytes:
    memories = {name: _memory(program) for name, program in programs.items()}
    temporaries = [
        memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        for memory in memories.values()
    ]
    weights, pool = bytes_per_device(lowering.params), bytes_per_device(lowering.kv_pages)
    return StepBytes(weights, pool, _padding(lowering, memories), max(temporaries, default=0))


def _padding(lowering: StepLowering, memories: Mapping[str, Any]) -> int:
    """What layouts add to the pool and to the weights of all layers."""
    for n in lowering.program.buckets.tokens:
        if whole := memories.get(whole_name(n)):
            return whole.argument_size_in_bytes - bytes_per_device(lowering.backbone_args(n))
        kinds = set(lowering.span_kinds)
        if all(span_name(kind, n) in memories for kind in kinds):
            break
    else:
        return 0
    padding = 0
    for index, kind in enumerate(lowering.span_kinds):
        args, memory = lowering.span_args(kind, n), memories[span_name(kind, n)]
        added = memory.argument_size_in_bytes - bytes_per_device(args)
        # The pool is an argument of every span; it and the hidden states are what comes out.
        of_pool = memory.alias_size_in_bytes - bytes_per_device(args[2:4])
        padding += added - (of_pool if index else 0)
    return padding


def _memory(compiled: Compiled) -> Any:
    memory = compiled.memory_analysis()
    assert memory is not None, "this compiler does not say what its programs take"
    return memory
