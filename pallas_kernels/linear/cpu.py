"""A linear layer on CPUs: a custom call of XLA:CPU, compiled by Numba.

A step of few tokens is bound by reading the weights, and XLA's product stops at each part of them
for memory. Here the next part is fetched while one is multiplied, and threads that have finished
wait for the next product. Sums stay in registers, as in BLIS (Van Zee and van de Geijn, 2015), but
nothing is packed: a weight is used once. Activations of many tokens lie token by token next to one
another, which XLA's other operations give and take as they are.

Of a quantised weight a few rows at a time are made ready, as float32 or, for int8 activations, as
bytes, and multiplied with all tokens while they are in a cache. An output is summed up in the same
order however many tokens there are: a token's results are the same bits alone and among others.

The 120 products of SmolLM2's layers at 1 and at 8 tokens took, at best and in the time of about one
busy core of an Emerald Rapids Xeon: float32 28 and 33 ms; int4-g32-float16 13 and 27 ms, with int8
activations 10 and 19 ms; int8-g32-float16 18 and 26 ms, with int8 activations 13 and 24 ms.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cpu_calls import targets
from pallas_kernels.linear import xla
from pallas_kernels.weights import Format, Quantised

TARGET = "jaxserve_linear"
QUANTISED_TARGETS = {
    activations: f"jaxserve_linear_quantised_{activations}" for activations in ("float", "int8")
}
DTYPE = "float32"
MOST_TOKENS = 192  # beyond, a product is bound by arithmetic, and XLA's packs what it multiplies
COLUMNS_FROM = 16  # tokens from which on they, and not the features, lie next to one another


def refusal(dtype: str) -> str | None:
    """Why the kernel does not take activations, and weights, of a type, or None if it does."""
    return None if dtype == DTYPE else f"it takes {DTYPE}, not {dtype}"


def prepare(format: Format | None = None, activations: str = "float") -> None:
    """Make the kernel known to XLA: before a program that has it is loaded.

    Args:
        format: of the weights, or None if they are not quantised.
        activations: as of `linear`.
    """
    if format is None:
        return targets.prepare(TARGET, "pallas_kernels.linear.cpu_call")
    module = f"pallas_kernels.linear.cpu_{activations}_call"
    return targets.prepare(QUANTISED_TARGETS[activations], module)


def linear(
    x: jax.Array, weight: jax.Array | Quantised, activations: str, num_tokens: jax.Array | None
) -> jax.Array:
    """`pallas_kernels.linear.linear` on a CPU: what is behind `num_tokens` is left out, and zero.

    A shape of more than MOST_TOKENS tokens is left to XLA if the weight is not quantised.

    Raises:
        ValueError: the weight or the activations are not float32.
    """
    for array in (x, weight):
        if reason := refusal(jnp.dtype(array.dtype).name):
            raise ValueError(f"linear 'cpu': {reason}")
    if isinstance(weight, Quantised):
        return _multiply_quantised(x, weight, activations, num_tokens)
    if x.shape[0] > MOST_TOKENS:
        return xla.linear(x, weight, activations, num_tokens)
    prepare()
    tokens, outputs = x.shape[0], weight.shape[: weight.ndim - x.ndim + 1]
    width = math.prod(x.shape[1:])
    layout = (1, 0) if tokens >= COLUMNS_FROM else (0, 1)
    call = jax.ffi.ffi_call(
        TARGET,
        jax.ShapeDtypeStruct((tokens, math.prod(outputs)), jnp.float32),
        input_layouts=(layout, (0, 1), ()),
        output_layouts=layout,
    )
    count = _count(x, num_tokens)
    out = call(x.reshape(tokens, width), weight.reshape(-1, width), count)
    return out.reshape(tokens, *outputs)


def _count(x: jax.Array, num_tokens: jax.Array | None) -> jax.Array:
    return jnp.asarray(x.shape[0] if num_tokens is None else num_tokens, jnp.int32).reshape(())


def _multiply_quantised(
    x: jax.Array, weight: Quantised, activations: str, num_tokens: jax.Array | None
) -> jax.Array:
    prepare(weight.format, activations)
    tokens, outputs = x.shape[0], weight.shape[:-1]

    def rows(array: Any) -> jax.Array:
        return array.reshape(-1, array.shape[-1])

    scales = rows(weight.scales)
    minimums = jnp.zeros((0, 0), scales.dtype) if weight.minimums is None else rows(weight.minimums)
    result = jax.ShapeDtypeStruct((tokens, math.prod(outputs)), jnp.float32)
    call = jax.ffi.ffi_call(QUANTISED_TARGETS[activations], result)
    count = _count(x, num_tokens)
    out = call(x.reshape(tokens, -1), rows(weight.values), scales, minimums, count)
    return out.reshape(tokens, *outputs)
