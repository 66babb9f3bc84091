"""Sampling on the device, with every setting per row, so that no setting recompiles."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.runner.packing import SamplingRows

LOWEST = -1e30  # finite, so that a masked row has no NaN
BLOCK = 64  # tokens


def sample(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Draw one token per row.

    Filters apply in this order: temperature, then top-k, top-p and min-p on what is left.
    The random key of a row is fold_in(seed, position): who else is in the batch, and how often
    the request was preempted, do not matter. If every row is greedy nothing else is computed.

    Args:
        logits: float32 [rows, vocab].
        rows: settings, each field [rows].

    Returns:
        int32 [rows].
    """
    greedy = _argmax(logits)
    random = lax.cond(
        jnp.any(rows.temperature > 0), _draw, lambda *_: jnp.zeros_like(greedy), logits, rows
    )
    return jnp.where(rows.temperature > 0, random, greedy)


def _draw(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    scaled = logits / jnp.maximum(rows.temperature, 1e-6)[:, None]
    scaled = lax.cond(
        jnp.any((rows.top_k > 0) | (rows.top_p < 1)),
        lambda x: _keep_top_p(_keep_top_k(x, rows.top_k), rows.top_p),
        lambda x: x,
        scaled,
    )
    least = jnp.max(scaled, axis=-1) + jnp.log(jnp.maximum(rows.min_p, 1e-30))
    kept = (scaled >= least[:, None]) | (rows.min_p <= 0)[:, None]
    scaled = jnp.where(kept, scaled, LOWEST)
    return lax.platform_dependent(scaled, rows, cpu=_draw_by_sums, default=_draw_gumbels)


def _draw_gumbels(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """A draw from softmax(logits): the largest of logits + Gumbel noise."""
    vocab = logits.shape[-1]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocab,), jnp.float32))(_keys(rows))
    return _argmax_plain(logits + noise)


def _draw_by_sums(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """A draw from softmax(logits) by inversion: a block by one random number, then its token.

    Two random numbers per row: those of Gumbel noise, one per token, take a CPU longer than all
    attention does.
    """
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    numbers = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(_keys(rows))
    return _by_blocks(
        weights,
        jnp.sum,
        lambda sums: _draw_weighted(sums, numbers[:, 0]),
        lambda inside: _draw_weighted(inside, numbers[:, 1]),
    )


def _draw_weighted(weights: jax.Array, numbers: jax.Array) -> jax.Array:
    """Index of each row's weight that a number of [0, 1) falls to: [rows, n] -> int32 [rows].

    Sums are rounded, and need not even rise; but a weight of 0 is never drawn.
    """
    ends, place = jnp.cumsum(weights, axis=-1), jnp.arange(weights.shape[-1])
    passed = ends > (numbers * ends[:, -1])[:, None]
    # The first of those that passed; if there is none, the last of all.
    rank = jnp.where(passed, 2 * len(place) - place, place)
    return _argmax_plain(jnp.where(weights > 0, rank, -1))


def _argmax(x: jax.Array) -> jax.Array:
    """Index of each row's first maximum: [rows, vocab] -> int32 [rows]."""
    return lax.platform_dependent(x, cpu=_argmax_by_blocks, default=_argmax_plain)


def _argmax_plain(x: jax.Array) -> jax.Array:
    return jnp.argmax(x, axis=-1).astype(jnp.int32)


def _argmax_by_blocks(x: jax.Array) -> jax.Array:
    """`_argmax` by blocks of the vocabulary: their maxima, the best block, the best inside it.

    XLA:CPU vectorises a maximum, but not an argmax.
    """
    return _by_blocks(x, jnp.max, _argmax_plain, _argmax_plain)


def _by_blocks(
    x: jax.Array,
    summary: Callable[..., jax.Array],
    choose_block: Callable[[jax.Array], jax.Array],
    choose_inside: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Index of a number of each row, [rows, vocab] -> int32 [rows]: its block's, then its own.

    Args:
        x: [rows, vocab].
        summary: of a block's numbers, along an `axis`.
        choose_block: from all blocks' summaries, [rows, n] -> int32 [rows].
        choose_inside: likewise from the numbers of the block.
    """
    rows, vocab = x.shape
    block = math.gcd(vocab, BLOCK)
    blocks = x.reshape(rows, vocab // block, block)
    best = choose_block(summary(blocks, axis=-1))
    inside = jnp.take_along_axis(blocks, best[:, None, None], axis=1)[:, 0]
    return best * block + choose_inside(inside)


def _keys(rows: SamplingRows) -> jax.Array:
    """Random keys [rows]: of a request's seed and the token's position alone."""
    return jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(
        rows.seed, rows.position
    )


def _keep_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """Mask what is less likely than the k-th most likely token (0 keeps all; ties stay)."""
    vocab = logits.shape[-1]
    k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
    ordered = _ordered_bits(logits)
    threshold = _largest(ordered, lambda t: jnp.sum(ordered >= t[:, None], axis=-1) >= k)
    return jnp.where(ordered >= threshold[:, None], logits, LOWEST)


def _keep_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Mask all but the smallest set of most likely tokens that holds `top_p` (ties stay)."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    ordered = _ordered_bits(probabilities)

    def enough(t: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(ordered >= t[:, None], probabilities, 0), axis=-1) >= top_p

    threshold = jnp.where(top_p < 1, _largest(ordered, enough), jnp.iinfo(jnp.int32).min)
    return jnp.where(ordered >= threshold[:, None], logits, LOWEST)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """float32 -> int32 that compares the same way."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _largest(ordered: jax.Array, holds) -> jax.Array:
    """Per row, the largest int32 threshold for which `holds`, found bit by bit.

    `holds(t)` is true for small t and false from some t on. 32 passes over the row replace a
    sort of the vocabulary, which no platform does fast.
    """

    def narrow(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends  # holds(low), and nothing above high does
        # Mean rounded up, without overflow.
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        good = holds(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    low, high = jnp.min(ordered, axis=-1), jnp.max(ordered, axis=-1)
    return lax.fori_loop(0, 32, narrow, (low, high))[0]
