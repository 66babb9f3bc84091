"""A linear layer on CPUs: a custom call of XLA:CPU, compiled by Numba.

A step of few tokens is bound by reading the weights, and XLA's product stops at each part of them
for memory. Here the next part is fetched while one is multiplied, and threads that have finished
wait for the next product. Sums stay in registers, as in BLIS (Van Zee and van de Geijn, 2015), but
nothing is packed: a weight is used once. Activations of many tokens lie token by token next to one
another, which XLA's other operations give and take as they are.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.cpu_calls import targets
from pallas_kernels.linear import xla
from pallas_kernels.weights import Format, Quantised

TARGET = "jaxserve_linear"
DTYPE = "float32"
MOST_TOKENS = 192  # beyond, a product is bound by arithmetic, and XLA's packs what it multiplies
COLUMNS_FROM = 16  # tokens from which on they, and not the features, lie next to one another


def refusal(dtype: str, format: Format | None = None) -> str | None:
    """Why the kernel does not take weights of a type, or None if it does."""
    if format is not None:
        return f"it takes {DTYPE} weights, not {format}"
    return None if dtype == DTYPE else f"it takes {DTYPE}, not {dtype}"


def prepare() -> None:
    """Make the kernel known to XLA: before a program that has it is loaded."""
    targets.prepare(TARGET, "pallas_kernels.linear.cpu_call")


def linear(x: jax.Array, weight: jax.Array | Quantised, _activations: str) -> jax.Array:
    """`pallas_kernels.linear.linear` on a CPU; more than MOST_TOKENS tokens are left to XLA.

    Raises:
        ValueError: the weight or the activations are not float32.
    """
    if isinstance(weight, Quantised):
        raise ValueError(f"linear 'cpu': {refusal(DTYPE, weight.format)}")
    for array in (x, weight):
        if reason := refusal(jnp.dtype(array.dtype).name):
            raise ValueError(f"linear 'cpu': {reason}")
    if x.shape[0] > MOST_TOKENS:
        return xla.linear(x, weight)
    prepare()
    tokens, outputs = x.shape[0], weight.shape[: weight.ndim - x.ndim + 1]
    width = math.prod(x.shape[1:])
    layout = (1, 0) if tokens >= COLUMNS_FROM else (0, 1)
    call = jax.ffi.ffi_call(
        TARGET,
        jax.ShapeDtypeStruct((tokens, math.prod(outputs)), jnp.float32),
        input_layouts=(layout, (0, 1)),
        output_layouts=layout,
    )
    return call(x.reshape(tokens, width), weight.reshape(-1, width)).reshape(tokens, *outputs)
