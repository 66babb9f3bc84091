"""A linear layer as its specification says it."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear.activations import round_activations
from pallas_kernels.weights import Quantised


def linear(
    x: jax.Array, weight: jax.Array | Quantised, activations: str, _num_tokens: jax.Array | None
) -> jax.Array:
    """`pallas_kernels.linear.linear` of all tokens, in the widest type that JAX is set to."""
    kind = x.dtype
    numbers: Any = weight
    wide = jnp.promote_types(kind, jnp.float32)
    if isinstance(weight, Quantised):
        x = x.reshape(x.shape[0], -1)
        if activations == "int8":
            x = round_activations(x, weight.format)
        numbers = weight.dequantise()
    transposed = jnp.moveaxis(numbers.astype(wide), range(1 - x.ndim, 0), range(x.ndim - 1))
    return jnp.tensordot(x.astype(wide), transposed, x.ndim - 1, precision="highest").astype(kind)
