"""Activations times a weight: what a decoding step spends most of its time reading."""

import importlib
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

Implementation = Literal["auto", "cpu", "xla", "reference"]
NAMES: tuple[str, ...] = get_args(Implementation)


def choose_implementation(implementation: str, device: Any, num_devices: int, dtype: Any) -> str:
    """The implementation to run; a name never stands for another one.

    Args:
        implementation: a name, or "auto" for the fastest.
        device: the `jax.Device`, one of those where it will run.
        num_devices: how many those are. XLA splits its own products over a mesh, and not what it
            cannot look into.
        dtype: of activations and weights.

    Raises:
        ValueError: no implementation has that name, or the one named cannot run.
    """
    if implementation not in NAMES:
        raise ValueError(f"no linear {implementation!r}; there are {', '.join(NAMES)}")
    if implementation not in ("auto", "cpu"):
        return implementation
    reason = _module("cpu").refusal(jnp.dtype(dtype).name)
    if device.platform != "cpu":
        reason = f"it takes a CPU, and this is {device.platform}"
    elif num_devices > 1:
        reason = f"it takes one device, and the mesh has {num_devices}"
    if reason is None:
        return "cpu"
    if implementation == "cpu":
        raise ValueError(f"linear 'cpu' cannot run here: {reason}; use 'auto' or 'xla'")
    return "xla"


def prepare(implementation: str) -> None:
    """Get ready what programs call that were compiled before and come from a file.

    Args:
        implementation: one that `choose_implementation` gave.
    """
    if implementation == "cpu":
        _module("cpu").prepare()


def linear(x: jax.Array, weight: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """x times weight, transposed.

    Args:
        x: [tokens, in...].
        weight: [out..., in...].
        implementation: "auto" picks the fastest for one device of this machine; a named one is
            used or fails.

    Returns:
        [tokens, out...] in x's dtype.

    Raises:
        ValueError: unknown implementation, or one that does not take these types.
    """
    if implementation == "auto":
        implementation = choose_implementation("auto", jax.devices()[0], 1, weight.dtype)
    return _module(implementation).linear(x, weight)


def _module(implementation: str) -> Any:
    return importlib.import_module(f"pallas_kernels.linear.{implementation}")
