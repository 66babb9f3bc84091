"""How a TPU lays arrays out in memory: in tiles, the last axis in whole lanes."""

from typing import Any

import jax.numpy as jnp

LANES = 128


def padded_to_lanes(size: int) -> int:
    """What the last axis of an array takes, in elements."""
    return -(-size // LANES) * LANES


def tile_rows(dtype: Any) -> int:
    """Rows of one tile: narrow dtypes share 32-bit words between rows."""
    return 32 // jnp.dtype(dtype).itemsize
