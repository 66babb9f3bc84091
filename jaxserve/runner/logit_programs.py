"""What is done to the logits of a late step, and what is read from them, on the device.

Rows of the vocabulary's logits are large: they stay where the head made them, split over the
mesh like its weights. `edit_logits` and `token_logprobs` see one device's part, under
`jax.shard_map`; the partitioner would gather the whole rows for a scatter or a `top_k`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.core.sampling_params import MAX_LOGPROBS
from jaxserve.runner.sampler import LOWEST

EDIT_FIELDS = 5  # row, token, bias, factor, minus
EDITS_PER_TURN = 512
NO_ROW = -1  # of an edit that is padding
TOP_BLOCK = 64  # tokens
LOGPROB_FIELDS = 2 + 2 * MAX_LOGPROBS

ALL_TOKENS = np.uint32(0xFFFFFFFF)  # a word of a mask that allows its 32 tokens


def max_edits(rows: int) -> int:
    """Edits per shard that one call of `edit_logits` takes.

    A request has as many edits as different tokens, up to the whole context: 256 per row are
    rarely exceeded by all rows together, and what exceeds them goes in further calls. Always
    whole turns.
    """
    return -(-256 * rows // EDITS_PER_TURN) * EDITS_PER_TURN


def edit_logits(logits: jax.Array, edits: jax.Array, axis: str | None) -> jax.Array:
    """Apply biases and penalties to single logits.

    A logit l becomes p(l + bias) - minus, where p divides what is positive by `factor` and
    multiplies the rest. No (row, token) may come twice, in this call or in others on the same
    logits: so edits can be spread over calls in any way, and their order does not matter.

    Args:
        logits: float32 [1, rows, vocab / parts], one device's part.
        edits: int32 [1, EDIT_FIELDS, whole turns]: row, token, and the bits of float32 bias,
            factor and minus; edits of row NO_ROW are padding and come last.
        axis: the mesh axis that splits the vocabulary; None: it is not split.
    """
    rows, vocab = logits.shape[1:]
    first = 0 if axis is None else lax.axis_index(axis) * vocab

    def turn(i: jax.Array, logits: jax.Array) -> jax.Array:
        part = lax.dynamic_slice_in_dim(edits[0], i * EDITS_PER_TURN, EDITS_PER_TURN, axis=1)
        row, token = part[0], part[1] - first
        bias, factor, minus = lax.bitcast_convert_type(part[2:], jnp.float32)
        here = (row >= 0) & (token >= 0) & (token < vocab)
        row = jnp.where(here, row, rows)  # the others are out of range: read anything, dropped
        value = logits.at[0, row, token].get(mode="clip") + bias
        value = jnp.where(value > 0, value / factor, value * factor) - minus
        return logits.at[0, row, token].set(value, mode="drop")

    # As many turns as there are edits: padding costs its transfer only.
    turns = (jnp.sum(edits[0, 0] != NO_ROW) + EDITS_PER_TURN - 1) // EDITS_PER_TURN
    return lax.fori_loop(0, turns, turn, logits)


def allow(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """Leave only tokens that a mask allows.

    Args:
        logits: float32 [rows, vocab].
        masks: uint32 [rows, ceil(vocab / 32)]; see `SamplingExtras.mask`.
    """

    def apply(logits: jax.Array) -> jax.Array:
        bits = (masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        bits = bits.reshape(len(logits), -1)[:, : logits.shape[1]]
        return jnp.where(bits == 1, logits, LOWEST)

    return lax.cond(jnp.all(masks == ALL_TOKENS), lambda logits: logits, apply, logits)


def token_logprobs(logits: jax.Array, tokens: jax.Array, axis: str | None) -> jax.Array:
    """How likely tokens are, and which ones are the most likely.

    Args:
        logits: float32 [1, rows, vocab / parts], one device's part.
        tokens: int32 [1, rows].
        axis: the mesh axis that splits the vocabulary; None: it is not split.

    Returns:
        int32 [1, rows, LOGPROB_FIELDS], the same on all devices of a shard: the bits of the
        token's float32 log-probability; its rank; the MAX_LOGPROBS most likely tokens, ties by
        number (-1 beyond the vocabulary); the bits of their log-probabilities.
    """
    logits, tokens = logits[0], tokens[0]
    vocab = logits.shape[-1]
    first = 0 if axis is None else lax.axis_index(axis) * vocab
    over_devices = axis is not None

    highest = jnp.max(logits, axis=-1)
    highest = lax.pmax(highest, axis) if over_devices else highest
    total = jnp.sum(jnp.exp(logits - highest[:, None]), axis=-1)
    total = lax.psum(total, axis) if over_devices else total
    log_total = highest + jnp.log(total)

    local = tokens - first
    own = jnp.take_along_axis(logits, jnp.clip(local, 0, vocab - 1)[:, None], axis=-1)[:, 0]
    own = jnp.where((local >= 0) & (local < vocab), own, 0)
    own = lax.psum(own, axis) if over_devices else own  # one device has it
    rank = jnp.sum(logits >= own[:, None], axis=-1, dtype=jnp.int32)
    rank = lax.psum(rank, axis) if over_devices else rank

    top, ids = _top(logits)
    if over_devices:  # the best of each device's best, in the vocabulary's order
        top = lax.all_gather(top, axis, axis=1, tiled=True)
        ids = lax.all_gather(ids + first, axis, axis=1, tiled=True)
        top, best = lax.top_k(top, min(MAX_LOGPROBS, top.shape[1]))
        ids = jnp.take_along_axis(ids, best, axis=1)
    missing = ((0, 0), (0, MAX_LOGPROBS - top.shape[1]))
    ids = jnp.pad(ids, missing, constant_values=-1)
    top = jnp.pad(top - log_total[:, None], missing)
    parts = (_bits(own - log_total)[:, None], rank[:, None], ids, _bits(top))
    return jnp.concatenate(parts, axis=1)[None]


def _top(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The MAX_LOGPROBS largest of each row, and where they are; ties in order.

    By blocks of the vocabulary: k blocks with the largest maxima hold the k largest values, and
    the rest need not be sorted. A `top_k` of whole rows takes XLA:CPU as long as the head.
    """
    rows, vocab = logits.shape
    if vocab % TOP_BLOCK or vocab // TOP_BLOCK <= MAX_LOGPROBS:
        top, ids = lax.top_k(logits, min(MAX_LOGPROBS, vocab))
        return top, ids.astype(jnp.int32)
    blocks = logits.reshape(rows, vocab // TOP_BLOCK, TOP_BLOCK)
    best = jnp.sort(lax.top_k(jnp.max(blocks, axis=-1), MAX_LOGPROBS)[1], axis=-1)
    candidates = jnp.take_along_axis(blocks, best[:, :, None], axis=1).reshape(rows, -1)
    top, places = lax.top_k(candidates, MAX_LOGPROBS)
    block = jnp.take_along_axis(best, places // TOP_BLOCK, axis=1)
    return top, (block * TOP_BLOCK + places % TOP_BLOCK).astype(jnp.int32)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)
