"""A linear layer as its specification says it."""

import jax
import jax.numpy as jnp


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`pallas_kernels.linear.linear`, computed in the widest type that JAX is set to."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.tensordot(
        x.astype(wide), jnp.moveaxis(weight.astype(wide), range(1 - x.ndim, 0), range(x.ndim - 1)),
        x.ndim - 1, precision="highest",
    ).astype(x.dtype)  # fmt: skip
