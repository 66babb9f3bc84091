"""Activations as int8, rounded anew for every token: what is multiplied fastest."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.weights import Format

_MOST = 127


def quantise_activations(x: jax.Array, format: Format) -> tuple[jax.Array, jax.Array]:
    """Activations as int8 with a scale for each token and group of the weight's inputs.

    Symmetric: a group's largest number becomes 127 or -127. A token's codes do not depend on
    other tokens.

    Args:
        x: floating, [tokens, in].
        format: of the weight that they are multiplied with.

    Returns:
        Codes, int8 [tokens, in], and scales, float32 [tokens, groups].
    """
    tokens, inputs = x.shape
    numbers = x.astype(jnp.float32).reshape(tokens, format.num_groups(inputs), -1)
    largest = abs(numbers).max(-1, keepdims=True)
    upscale = _MOST / jnp.where(largest > 0, largest, 1)
    codes = jnp.rint(numbers * upscale).astype(jnp.int8)
    return codes.reshape(tokens, inputs), largest[..., 0] * np.float32(1 / _MOST)


def round_activations(x: jax.Array, format: Format) -> jax.Array:
    """What `quantise_activations` makes of activations [tokens, in], as float32."""
    codes, scales = quantise_activations(x, format)
    groups = codes.reshape(*scales.shape, -1).astype(jnp.float32)
    return (groups * scales[..., None]).reshape(x.shape)
