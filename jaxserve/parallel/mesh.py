"""The device mesh, and which logical axis of an array is split over which mesh axis."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.core.errors import ConfigError

AXES = ("data", "tensor")


def parse_mesh(text: str) -> dict[str, int]:
    """Read `data=D,tensor=T`; an axis left out has size 1.

    Raises:
        ConfigError: an unknown or repeated axis, or a size that is no positive number.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"(\w+)=(\d{1,9})", part)
        if match is None or match[1] not in AXES or match[1] in sizes or int(match[2]) < 1:
            raise ConfigError(f"--mesh must look like data=D,tensor=T with D, T >= 1, got {text!r}")
        sizes[match[1]] = int(match[2])
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(
    text: str,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """The mesh that `text` describes, over the first devices of this process.

    Raises:
        ConfigError: `text` is malformed, or asks for more devices than there are.
    """
    sizes = parse_mesh(text)
    devices = jax.devices() if devices is None else devices
    needed = math.prod(sizes.values())
    if needed > len(devices):
        raise ConfigError(
            f"--mesh {text} needs {needed} devices, but this machine has {len(devices)} "
            f"({devices[0].platform})"
        )
    return Mesh(np.asarray(devices[:needed]).reshape(tuple(sizes.values())), AXES)


def bytes_per_device(arrays: Any) -> int:
    """Bytes that one device holds of arrays, without what its layouts pad them with.

    Args:
        arrays: a pytree of arrays, or of what has shapes, types and, where split, shardings.
    """

    def of_one(array: Any) -> int:
        shape = array.sharding.shard_shape(array.shape) if array.sharding else array.shape
        return math.prod(shape) * np.dtype(array.dtype).itemsize

    return sum(map(of_one, jax.tree.leaves(arrays)))


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Names the mesh axis, if any, that splits each logical axis of weights and activations.

    Attributes:
        mesh: the device mesh.
        split: logical axes that are split over `tensor`; the others are replicated.
    """

    mesh: Mesh
    split: frozenset[str]

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """The partition of an array with these logical axes ("data" is the mesh's own)."""
        return PartitionSpec(
            *("data" if a == "data" else "tensor" if a in self.split else None for a in axes)
        )

    def sharding(self, *axes: str | None) -> NamedSharding:
        """The placement of an array with these logical axes."""
        return NamedSharding(self.mesh, self.spec(axes))

    @property
    def data(self) -> int:
        """Size of the data axis."""
        return self.mesh.shape["data"]

    @property
    def tensor(self) -> int:
        """Size of the tensor axis."""
        return self.mesh.shape["tensor"]

    @property
    def head_parts(self) -> int:
        """Over how many devices the attention heads are split."""
        return self.tensor if "kv_heads" in self.split else 1
