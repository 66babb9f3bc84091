"""What differs between the JAX versions we support, or is not public in one of them."""

import jax
from jax.sharding import get_abstract_mesh


def device_kind() -> str | None:
    """The kind of TPU that is traced for ("TPU v5 lite"), or None where that is unknown.

    An abstract mesh with a device (compiling ahead of time, for a TPU that is not there) goes
    before the default backend.
    """
    device = get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind if device.device_kind.startswith("TPU") else None
    return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else None


def num_cores() -> int:
    """TensorCores of the device that is traced for; two where a chip is one device (v4, v5p)."""
    device = get_abstract_mesh().abstract_device
    if device is not None:
        return device.num_cores or 1
    return getattr(jax.devices()[0], "num_cores", 1) if jax.default_backend() == "tpu" else 1
