"""Accelerators that need not be there: how much memory they have, and TPUs to compile for."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

from jaxserve.core.errors import ConfigError

GIB = 2**30

# Per JAX device, which is a chip except on TPU7x, where it is one of a chip's two halves.
HBM_BYTES = {
    "TPU v5 lite": 16 * GIB,  # v5e
    "TPU v6 lite": 32 * GIB,  # v6e
    "TPU v5": 95 * GIB,  # v5p; its two cores are one device
    "TPU7x": 192 * GIB // 2,
    "NVIDIA H100 80GB HBM3": 80 * GIB,
}


def hbm_bytes(device: Any) -> int:
    """Memory of a device, abstract or real, from its kind.

    Raises:
        ConfigError: nobody wrote down how much a device of this kind has.
    """
    if device.device_kind not in HBM_BYTES:
        raise ConfigError(
            f"the memory of {device.device_kind!r} is not known here; "
            f"known are {', '.join(HBM_BYTES)}"
        )
    return HBM_BYTES[device.device_kind]


def abstract_tpu_devices(topology: str) -> Sequence[Any]:
    """The devices of a TPU slice, for compiling on a machine that has none.

    Args:
        topology: generation and chips per side, such as "v5e:2x4" or "v5p:2x2x1". A whole host
            is the least: 2x2 chips.

    Raises:
        ConfigError: libtpu, which holds the compiler, is not installed, or there is no such
            slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("compiling for TPUs takes libtpu: pip install 'jaxserve[aot]'")
    # libtpu reads these when it is loaded. It would refuse to be in two processes at once, for
    # the sake of a chip that we do not touch, and would ask a cloud's metadata server where
    # it runs.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "true")
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except Exception as error:
        raise ConfigError(f"there is no TPU slice {topology!r}: {error}") from error
