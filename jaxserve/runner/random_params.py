"""Random weights for running an architecture without its checkpoint."""

import math
import zlib
from collections.abc import Mapping

import jax
import numpy as np


def random_params(targets: Mapping[str, jax.ShapeDtypeStruct], seed: int) -> dict[str, jax.Array]:
    """Weights of ordinary size: norms are 1, the rest normal with variance 1 / inputs.

    Drawn on the host, so that no program is compiled; each device is given its own shard only.

    Args:
        targets: shape, dtype and sharding of every parameter.
        seed: the same seed gives the same weights on any mesh.
    """
    return {name: _random(name, target, seed) for name, target in targets.items()}


def _random(name: str, target: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    if name.endswith("norm"):
        value = np.ones(target.shape, target.dtype)
    else:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        inputs = target.shape[-1] if not name.endswith(".o") else math.prod(target.shape[1:])
        value = rng.standard_normal(target.shape, np.float32)
        value *= inputs**-0.5
        value = value.astype(target.dtype, copy=False)
    return jax.make_array_from_callback(target.shape, target.sharding, lambda index: value[index])
