"""Three ways to learn lengths: by regression, by classes, by order. JAX functions, for training.

All of them know answers that were cut off at `max_tokens`: such a length is only a lower bound
(a censored observation, as survival analysis calls it).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = jax.Array | np.ndarray


class Labels(NamedTuple):
    """What came out.

    Attributes:
        log_length: float32 [batch], natural logarithm of the answer's tokens.
        bin: int32 [batch], see `LengthBins`.
        censored: bool [batch], whether the answer was cut off there.
    """

    log_length: Array
    bin: Array
    censored: Array


Loss = Callable[[jax.Array, Labels], jax.Array]


def exact_loss(outputs: jax.Array, labels: Labels) -> jax.Array:
    """Regression on the log length: Huber loss, none for exceeding a lower bound.

    Args:
        outputs: float32 [batch, 1], the predicted log length.
        labels: what came out.
    """
    error = outputs[:, 0] - labels.log_length
    error = jnp.where(labels.censored, jnp.minimum(error, 0), error)
    return jnp.mean(optax.huber_loss(error))


def range_loss(outputs: jax.Array, labels: Labels) -> jax.Array:
    """Classification into ranges of lengths, as in S3 (Jin et al., NeurIPS 2023).

    Cross entropy; of an answer that was cut off, that of its bin or any longer one.

    Args:
        outputs: float32 [batch, bins], logits.
        labels: what came out.
    """
    shares = jax.nn.log_softmax(outputs)
    bins = jnp.arange(outputs.shape[1])
    right = jnp.where(labels.censored[:, None], bins >= labels.bin[:, None],
                      bins == labels.bin[:, None])  # fmt: skip
    return -jnp.mean(jax.nn.logsumexp(jnp.where(right, shares, -jnp.inf), axis=1))


def rank_loss(outputs: jax.Array, labels: Labels) -> jax.Array:
    """Pairwise ranking within the batch, after Fu et al. (2024), with a logistic loss.

    They compare lists (ListMLE); pairs of which it is known who is shorter also allow lengths
    that are lower bounds.

    Args:
        outputs: float32 [batch, 1], scores that shall grow with the length.
        labels: what came out.
    """
    score, length = outputs[:, 0], labels.log_length
    shorter = length[:, None] < length[None, :]
    shorter |= (length[:, None] == length[None, :]) & labels.censored[None, :]
    known = shorter & ~labels.censored[:, None]
    losses = jax.nn.softplus(score[:, None] - score[None, :])
    return jnp.sum(losses, where=known) / jnp.maximum(jnp.sum(known), 1)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss, and whether it needs an output per bin or just one."""

    loss: Loss
    per_bin: bool = False


OBJECTIVES = {
    "exact": Objective(exact_loss),
    "range": Objective(range_loss, per_bin=True),
    "rank": Objective(rank_loss),
}
