"""The sampler against softmax and filters written plainly in float64 numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxserve.runner import sampler
from jaxserve.runner.packing import SamplingRows
from jaxserve.runner.sampler import sample

draw = jax.jit(sample)

VOCAB = 29
DRAWS = 256  # of each case
CASES = 16  # in one call
CLOSE = 1e-5  # float32 may round a cumulative probability to the other side of top_p by this


def settings(rows: int, **fields) -> SamplingRows:
    """One value for all rows or one per row, of each field."""
    kinds = dict(slot=np.int32, position=np.int32, seed=np.uint32, temperature=np.float32,
                 top_p=np.float32, min_p=np.float32, top_k=np.int32)  # fmt: skip
    values = dict(slot=0, position=0, seed=0, temperature=1.0, top_p=1.0, min_p=0.0, top_k=0)
    values |= fields
    return SamplingRows(
        **{k: jnp.asarray(np.broadcast_to(values[k], rows).astype(t)) for k, t in kinds.items()}
    )


def kept(
    logits: np.ndarray, *, temperature: float, top_k: int, top_p: float, min_p: float, slack: float
) -> np.ndarray:
    """Probabilities after all filters, float64 [vocab].

    A positive `slack` keeps tokens on the border of a filter, a negative one drops them.
    """
    scaled = logits.astype(np.float64) / temperature
    near = max(slack, 0)
    keep = np.ones(len(logits), bool)
    if 0 < top_k < len(logits):
        keep &= scaled >= np.sort(scaled)[-top_k] - near
    p = np.where(keep, np.exp(scaled - scaled.max()), 0)
    p /= p.sum()
    if top_p < 1:
        more_likely = np.array([p[p > x * (1 + near)].sum() for x in p])
        # The tokens before it do not hold top_p yet, or there are none.
        keep &= (more_likely < top_p + slack) | (more_likely == 0)
    keep &= (p >= min_p * p.max() * (1 - slack)) | (p == p.max())
    p = np.where(keep, p, 0)
    return p / p.sum()


def random_case(random: np.random.Generator) -> tuple[np.ndarray, dict]:
    logits = random.normal(0, random.choice([0.1, 1, 4]), VOCAB)
    if random.random() < 0.3:
        logits = np.round(logits * 2) / 2  # ties
    if random.random() < 0.2:
        logits -= 100  # all negative
    filters = {
        "temperature": random.choice([0.2, 0.7, 1.0, 1.9]),
        "top_k": int(random.choice([0, 1, 2, 5, VOCAB, 10**6])),
        "top_p": random.choice([1.0, 0.999, 0.9, 0.5, 0.01, 1e-20]),
        "min_p": random.choice([0.0, 0.05, 0.3, 1.0]),
    }
    for name in ("top_k", "top_p", "min_p"):  # each alone, too
        if random.random() < 0.4:
            filters[name] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}[name]
    return logits.astype(np.float32), filters


def test_only_kept_tokens_come_and_all_of_them():
    random = np.random.default_rng(7)
    for _ in range(160):
        cases = [random_case(random) for _ in range(CASES)]
        fields = {k: np.repeat([f[k] for _, f in cases], DRAWS) for k in cases[0][1]}
        rows = settings(
            CASES * DRAWS, position=np.tile(np.arange(DRAWS), CASES),
            seed=np.repeat(random.integers(2**32, size=CASES), DRAWS), **fields,
        )  # fmt: skip
        logits = np.repeat([x for x, _ in cases], DRAWS, axis=0)
        tokens = np.asarray(draw(logits, rows)).reshape(CASES, DRAWS)
        for (x, filters), drawn in zip(cases, tokens, strict=True):
            counts = np.bincount(drawn, minlength=VOCAB)
            may = kept(x, **filters, slack=CLOSE)
            assert not counts[may == 0].any(), (filters, x, counts)
            must = kept(x, **filters, slack=-CLOSE)
            assert counts[must * DRAWS > 25].all(), (filters, x, counts)


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"temperature": 0.8},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 11, "top_p": 0.9, "min_p": 0.03},
    ],
)
@pytest.mark.parametrize("axis", ["position", "seed"])
def test_frequencies_follow_the_softmax(filters: dict, axis: str):
    """Chi-square over draws that differ in position only, or in seed only."""
    count = 20011
    logits = np.random.default_rng(3).normal(0, 0.9, VOCAB).astype(np.float32)
    rows = settings(count, **{axis: np.arange(count)}, **filters)
    tokens = np.asarray(draw(np.broadcast_to(logits, (count, VOCAB)), rows))
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    expected = kept(logits, **full, slack=0) * count
    counts = np.bincount(tokens, minlength=VOCAB)
    assert not counts[expected == 0].any()
    assert expected[expected > 0].min() > 5, "too rare for a chi-square test"
    some = expected > 0
    assert some.sum() > 1
    assert stats.chisquare(counts[some], expected[some]).pvalue > 1e-4


def test_a_row_does_not_depend_on_the_others():
    random = np.random.default_rng(11)
    count = 64
    cases = [random_case(random) for _ in range(count)]
    fields = {k: np.array([f[k] for _, f in cases]) for k in cases[0][1]}
    fields["temperature"][::5] = 0  # greedy rows among them
    fields["position"] = random.integers(0, 10**6, count)
    fields["seed"] = random.integers(0, 2**32, count)
    logits = np.stack([x for x, _ in cases])
    together = np.asarray(draw(logits, settings(count, **fields)))
    order = random.permutation(count)
    shuffled = draw(logits[order], settings(count, **{k: v[order] for k, v in fields.items()}))
    np.testing.assert_array_equal(np.asarray(shuffled), together[order])
    for i in range(0, count, 3):
        alone = draw(logits[i : i + 1], settings(1, **{k: v[i] for k, v in fields.items()}))
        assert int(alone[0]) == together[i]


def test_greedy_rows_take_the_most_likely_token():
    random = np.random.default_rng(5)
    logits = random.normal(0, 1, (33, 997)).astype(np.float32)
    best = logits.argmax(axis=1)
    all_greedy = draw(logits, settings(33, temperature=0))
    np.testing.assert_array_equal(np.asarray(all_greedy), best)
    hot = np.where(np.arange(33) % 2, 3.0, 0.0)
    # Filters do not matter to a greedy row, and random neighbours do not either.
    mixed = np.asarray(draw(logits, settings(33, temperature=hot, top_p=0.9, seed=np.arange(33))))
    np.testing.assert_array_equal(mixed[hot == 0], best[hot == 0])
    assert (mixed[hot > 0] != best[hot > 0]).sum() > 8
    top_1 = draw(logits, settings(33, temperature=3.0, top_k=1, position=np.arange(33)))
    np.testing.assert_array_equal(np.asarray(top_1), best)


def test_equal_keys_draw_equally_and_different_ones_differently():
    logits = np.zeros((401, 5003), np.float32)
    same = np.asarray(draw(logits, settings(401, seed=2**32 - 1, position=17)))
    assert len(set(same.tolist())) == 1
    position = np.asarray(draw(logits, settings(401, seed=3, position=np.arange(401))))
    assert len(set(position.tolist())) > 360
    seed = np.asarray(draw(logits, settings(401, seed=np.arange(401), position=3)))
    assert len(set(seed.tolist())) > 360
    assert len(set((seed - position).tolist())) > 360  # (seed, position) is not symmetric


def test_large_vocabulary_nucleus():
    """Tokens' bits, not their sort order, find the nucleus: many tiny probabilities."""
    random = np.random.default_rng(2)
    logits = random.normal(0, 2, 32003).astype(np.float32)
    count = 256
    rows = settings(count, position=np.arange(count), top_p=0.7)
    tokens = np.asarray(draw(np.broadcast_to(logits, (count, 32003)), rows))
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    order = np.argsort(-p)
    size = int(np.searchsorted(np.cumsum(p[order]), 0.7)) + 1
    ranks = np.argsort(order)[tokens]
    assert ranks.max() <= size + 2
    assert ranks.max() > size * 0.8  # and the tail of the nucleus does come


@pytest.mark.parametrize("way", [sampler._draw_by_sums, sampler._draw_gumbels])
@pytest.mark.parametrize("vocab", [1, 41, 192])
def test_both_ways_draw_from_the_softmax(way: Any, vocab: int):
    """The CPU's, by blocks or not, and that of other devices; what is masked never comes."""
    count, random = 30011, np.random.default_rng(vocab)
    logits = random.normal(0, 0.7, vocab).astype(np.float32)
    logits[random.permutation(vocab)[: vocab // 3]] = sampler.LOWEST
    rows = settings(count, position=np.arange(count))
    tokens = np.asarray(jax.jit(way)(jnp.broadcast_to(logits, (count, vocab)), rows))
    p = np.exp(logits.astype(np.float64))
    counts = np.bincount(tokens, minlength=vocab)
    assert not counts[p == 0].any() and len(counts) == vocab
    some = p > 0
    if some.sum() > 1:
        assert stats.chisquare(counts[some], count * p[some] / p.sum()).pvalue > 1e-4


@pytest.mark.parametrize("count", [1, 5, 64, 1009])
def test_a_weight_of_zero_is_never_drawn(count: int):
    """At the ends of the range, and where sums that are rounded differently could fall."""
    random = np.random.default_rng(count)
    weights = random.exponential(1, (3000, count)) * 10.0 ** random.integers(-6, 6, (3000, count))
    weights[random.random(weights.shape) < 0.7] = 0
    weights[:, random.integers(count)] = 1e-3  # at least one
    numbers = random.random(3000).astype(np.float32)
    numbers[::3], numbers[1::3] = 0, np.nextafter(np.float32(1), np.float32(0))
    drawn = jax.jit(sampler._draw_weighted)(jnp.asarray(weights, jnp.float32), numbers)
    assert (weights[np.arange(3000), np.asarray(drawn)] > 0).all()


@pytest.mark.parametrize("vocab", [1, 7, 64, 101, 192, 277 * 4])
def test_the_first_of_equal_logits_is_taken(vocab: int):
    """By blocks or not, it is `argmax`; few different values, so that many are equal."""
    logits = np.random.default_rng(vocab).integers(0, 3, (5, vocab)).astype(np.float32)
    logits[1] = -np.inf
    got = sampler._argmax_by_blocks(jnp.asarray(logits))
    np.testing.assert_array_equal(got, logits.argmax(axis=-1))
