"""Activations times a weight: what a decoding step spends most of its time reading."""

import importlib
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.weights import Format, Quantised

Implementation = Literal["auto", "cpu", "xla", "reference"]
NAMES: tuple[str, ...] = get_args(Implementation)
SPLIT_BY_XLA = ("xla", "reference")  # products of arrays over a mesh; others are of one shard's
Activations = Literal["float", "int8"]


def choose_implementation(
    implementation: str,
    device: Any,
    dtype: Any,
    format: Format | None = None,
) -> str:
    """The implementation to run; a name never stands for another one.

    Args:
        implementation: a name, or "auto" for the fastest.
        device: the `jax.Device`, one of those where it will run.
        dtype: of activations, and of weights that are not quantised.
        format: of weights, or None where they are not quantised.

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
    if reason is None:
        return "cpu"
    if implementation == "cpu":
        raise ValueError(f"linear 'cpu' cannot run here: {reason}; use 'auto' or 'xla'")
    return "xla"


def prepare(
    implementation: str, format: Format | None = None, activations: Activations = "float"
) -> None:
    """Get ready what programs call that were compiled before and come from a file.

    Args:
        implementation: one that `choose_implementation` gave.
        format: of weights, or None where they are not quantised; once for each kind there is.
        activations: as of `linear`.
    """
    if implementation == "cpu":
        _module("cpu").prepare(format, activations)


def linear(
    x: jax.Array,
    weight: jax.Array | Quantised,
    *,
    implementation: str = "auto",
    activations: Activations = "float",
    num_tokens: jax.Array | None = None,
) -> jax.Array:
    """x times weight, transposed.

    Args:
        x: [tokens, in...].
        weight: [out..., in...]; a quantised one has its inputs flattened, [out..., in].
        implementation: "auto" picks the fastest for one device of this machine; a named one is
            used or fails.
        activations: "float" multiplies x as it is with the numbers that the weight stands for;
            "int8" rounds each token to int8 first, with a scale for each group of the weight
            (`activations.quantise_activations`), and takes a weight of integer codes.
        num_tokens: int32 scalar: how many tokens there are, where x is padded; None: all of it.
            What rows behind them come to is not said: an implementation may leave them out.

    Returns:
        [tokens, out...] in x's dtype.

    Raises:
        ValueError: unknown implementation, or one that does not take these types; the weight's
            arrays or its inputs do not fit.
    """
    format = weight.format if isinstance(weight, Quantised) else None
    _check(x, weight, activations)
    if implementation == "auto":
        implementation = choose_implementation("auto", jax.devices()[0], x.dtype, format)
    return _module(implementation).linear(x, weight, activations, num_tokens)


def _check(x: jax.Array, weight: jax.Array | Quantised, activations: str) -> None:
    if activations not in get_args(Activations):
        kinds = ", ".join(get_args(Activations))
        raise ValueError(f"no activations {activations!r}; there are {kinds}")
    if isinstance(weight, Quantised):
        weight.check()
        if math.prod(x.shape[1:]) != weight.shape[-1]:
            raise ValueError(
                f"activations {list(x.shape)} do not fit a weight {list(weight.shape)}"
            )
    if activations == "int8":
        kind = str(weight.format) if isinstance(weight, Quantised) else weight.dtype.name
        if not kind.startswith("int") or not isinstance(weight, Quantised):
            raise ValueError(f"activations 'int8' take a weight of integer codes, not {kind}")


def _module(implementation: str) -> Any:
    return importlib.import_module(f"pallas_kernels.linear.{implementation}")
