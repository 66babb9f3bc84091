"""Which implementation runs: the fastest that a device and a shape allow, or the one named."""

import importlib
import logging
from typing import Any, Literal, get_args

from pallas_kernels.paged_attention.tuning import Shape

log = logging.getLogger(__name__)

Implementation = Literal["auto", "tpu", "gpu", "cpu", "xla", "reference"]
NAMES: tuple[str, ...] = get_args(Implementation)
HOPPER = 9.0  # compute capability
# Kernels for one kind of device: what it is called, and JAX's platforms.
_DEVICES = {
    "tpu": ("a TPU", ("tpu",)),
    "gpu": ("an NVIDIA GPU", ("gpu", "cuda")),
    "cpu": ("a CPU", ("cpu",)),
}


def choose_implementation(implementation: str, device: Any, shape: Shape) -> str:
    """The implementation to run on a device; a name never stands for another one.

    Args:
        implementation: a name, or "auto" for the fastest.
        device: the `jax.Device` where it will run.
        shape: of one shard.

    Raises:
        ValueError: no implementation has that name, or the one named cannot run.
    """
    if implementation != "auto":
        kernel_module(implementation)
        if (reason := _refusal(implementation, device, shape)) is not None:
            raise ValueError(f"attention {implementation!r} cannot run here: {reason}")
        return implementation
    kernels = (name for name, (_, platforms) in _DEVICES.items() if device.platform in platforms)
    if (kernel := next(kernels, None)) is None:
        return "xla"
    if (reason := _refusal(kernel, device, shape)) is not None:
        log.warning(
            "attention: the XLA implementation instead of the %s kernel: %s", kernel, reason
        )
        return "xla"
    return kernel


def _refusal(kernel: str, device: Any, shape: Shape) -> str | None:
    """Why a kernel cannot run, or None if it can."""
    if kernel not in _DEVICES:
        return None
    takes, platforms = _DEVICES[kernel]
    if device.platform not in platforms:
        return f"it takes {takes}, and this is {device.platform}; use 'auto' or 'xla'"
    if kernel == "gpu":
        capability = float(getattr(device, "compute_capability", 0))
        if capability < HOPPER:
            return (
                f"it takes a Hopper GPU (compute capability {HOPPER}) or newer, and "
                f"{device.device_kind} has {capability}; use 'auto' or 'xla'"
            )
    return kernel_module(kernel).refusal(shape)


def kernel_module(kernel: str) -> Any:
    """The module of an implementation, imported when it is first needed.

    Raises:
        ValueError: there is none of that name.
    """
    if kernel not in NAMES[1:]:
        raise ValueError(f"no paged attention {kernel!r}; there are {', '.join(NAMES)}")
    return importlib.import_module(f"pallas_kernels.paged_attention.{kernel}")
