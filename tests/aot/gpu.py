"""Compiles for an H100 on a machine that has none: XLA:GPU and ptxas, and no device."""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec

TARGET_CONFIG = Path(__file__).with_name("h100_target_config.txtpb")
DEVICE_KIND, SM_COUNT = "NVIDIA H100 80GB HBM3", 132

needs_cuda_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs the CUDA plugin (jax-cuda12-plugin, jax-cuda12-pjrt, nvidia-cuda-nvcc-cu12)",
)


@functools.cache
def h100_topology() -> topologies.TopologyDescription:
    """One H100."""
    return topologies.get_topology_desc(
        platform="cuda", target_config=TARGET_CONFIG.read_text(), topology="1x1x1"
    )


def h100_compile(
    function: Callable[..., Any], *abstract_args: Any, donate_argnums: tuple[int, ...] = ()
) -> jax.stages.Compiled:
    """Compiles a function for one H100 that need not be there.

    Args:
        function: what to compile; what it traces may ask for the platform's name.
        abstract_args: its arguments as pytrees of anything that has a shape and a dtype.
        donate_argnums: as in `jax.jit`.

    Returns:
        The executable: `memory_analysis()` works, calling it does not.
    """
    device = AbstractDevice(platform="cuda", device_kind=DEVICE_KIND, num_cores=SM_COUNT)
    mesh = topologies.make_mesh(h100_topology(), (1,), ("x",))
    replicated = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), abstract_args
    )
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        lowered = jax.jit(function, donate_argnums=donate_argnums).lower(*args)
        return lowered.compile()
