"""Penalties, biases, masks and log-probabilities against a sampler written plainly in numpy."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxserve.core.sampling_params import MAX_LOGPROBS, SamplingParams
from jaxserve.core.step import SamplingExtras
from jaxserve.parallel.mesh import make_mesh
from jaxserve.runner.late_sampler import unpack_logprobs
from jaxserve.runner.logit_edits import LateRow, pack_edits, pack_masks
from jaxserve.runner.logit_programs import (
    EDITS_PER_TURN,
    allow,
    edit_logits,
    max_edits,
    token_logprobs,
)
from jaxserve.runner.sampler import sample
from tests.runner.test_sampler import CLOSE, kept, settings

VOCAB = 141  # not a multiple of a mask's word
WORDS = 5
ROWS = 16

edit = jax.jit(partial(edit_logits, axis=None))
logprobs_of = jax.jit(partial(token_logprobs, axis=None))
draw = jax.jit(lambda logits, masks, rows: sample(allow(logits, masks), rows))


def case(random: np.random.Generator) -> tuple[np.ndarray, SamplingParams, SamplingExtras]:
    """Logits and all that shapes them; each part is missing in some cases."""
    logits = random.normal(0, random.choice([0.3, 1, 5]), VOCAB).astype(np.float32)
    if random.random() < 0.3:
        logits = np.round(logits)  # ties, and zeros
    fields: dict[str, Any] = {}
    if random.random() < 0.6:
        fields["repetition_penalty"] = random.choice([0.3, 0.9, 1.0, 1.2, 4.0])
        fields["presence_penalty"] = random.choice([-2.0, 0.0, 0.7, 2.0])
        fields["frequency_penalty"] = random.choice([-1.0, 0.0, 0.1, 2.0])
    if random.random() < 0.6:
        biased = random.choice(VOCAB, random.integers(1, VOCAB), replace=False).tolist()
        fields["logit_bias"] = {t: random.choice([-100, -1.5, 0.25, 3, 100]) for t in biased}
    fields["temperature"] = random.choice([0, 0.2, 1.0, 2.0])
    fields["top_k"] = int(random.choice([0, 0, 1, 5]))
    fields["top_p"] = random.choice([1.0, 1.0, 0.8, 0.3])
    fields["min_p"] = random.choice([0.0, 0.0, 0.1])
    mask = None
    if random.random() < 0.5:
        allowed = random.choice(VOCAB, random.choice([1, 2, 40, VOCAB]), replace=False)
        bits = np.zeros(32 * WORDS, np.uint8)
        bits[allowed] = 1
        mask = np.packbits(bits, bitorder="little").view(np.uint32)
    # Some histories have more occurrences than one edit array has places.
    history = random.integers(0, VOCAB, random.choice([0, 1, 30, 900])).tolist()
    prompt = int(random.integers(0, len(history) + 1))
    return logits, SamplingParams(**fields), SamplingExtras(mask, history, prompt)


def plainly_edited(logits: np.ndarray, params: SamplingParams, extras: SamplingExtras):
    """Biases and penalties in float64, token by token."""
    out = logits.astype(np.float64)
    for token, value in params.biases:
        out[token] += value
    if not params.has_penalties:
        return out
    answer = list(extras.history[extras.num_prompt_tokens :])
    for token in set(extras.history):
        penalty = params.repetition_penalty
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    for token in set(answer):
        out[token] -= params.presence_penalty + params.frequency_penalty * answer.count(token)
    return out


def allowed_tokens(mask: np.ndarray | None) -> np.ndarray:
    if mask is None:
        return np.ones(VOCAB, bool)
    return np.array([mask[t // 32] >> (t % 32) & 1 for t in range(VOCAB)], bool)


def test_thousands_of_cases():
    """Every edited logit, the greedy tokens, and that random tokens are admissible."""
    random = np.random.default_rng(17)
    calls = []
    for _ in range(250):
        cases = [case(random) for _ in range(ROWS)]
        rows = [LateRow(0, i, params, extras) for i, (_, params, extras) in enumerate(cases)]
        raw = np.stack([logits for logits, *_ in cases])
        logits = jnp.asarray(raw[None])
        edits = pack_edits(rows, num_shards=1, capacity=EDITS_PER_TURN, vocab_size=VOCAB)
        calls.append(len(edits))
        for packed in edits:
            logits = edit(logits, packed)
        expected = [plainly_edited(*each) for each in cases]
        np.testing.assert_allclose(logits[0], expected, rtol=1e-5, atol=2e-5)

        masks = pack_masks(rows, (1, ROWS, WORDS))
        assert (masks is None) == all(extras.mask is None for *_, extras in cases)
        if masks is None:
            masks = np.full((1, ROWS, WORDS), 2**32 - 1, np.uint32)
        names = ("temperature", "top_k", "top_p", "min_p")
        fields = {name: np.array([getattr(p, name) for _, p, _ in cases]) for name in names}
        seeds = random.integers(2**32, size=ROWS)
        tokens = np.asarray(draw(logits[0], masks[0], settings(ROWS, seed=seeds, **fields)))
        for i, (_, params, extras) in enumerate(cases):
            allowed = allowed_tokens(extras.mask)
            assert allowed[tokens[i]]
            shaped = np.where(allowed, np.asarray(logits[0, i], np.float64), -1e30)
            if params.greedy:
                assert tokens[i] == shaped.argmax()
                continue
            filters = {name: getattr(params, name) for name in names}
            assert kept(shaped, **filters, slack=CLOSE)[tokens[i]] > 0
    assert min(calls) == 1 and max(calls) > 2, "edits never overflow, or always"


def test_shaped_rows_follow_the_softmax():
    """Draws with consecutive seeds have the frequencies that numpy says they should have."""
    random = np.random.default_rng(3)
    count = 8192
    logits = random.normal(0, 1, VOCAB).astype(np.float32)
    params = SamplingParams(
        repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.3,
        logit_bias={5: 2.0, 6: -3.0},
    )  # fmt: skip
    mask = np.full(WORDS, 0x0F0F00FF, np.uint32)
    extras = SamplingExtras(mask, random.integers(0, 20, 40).tolist(), 25)
    row = LateRow(0, 0, params, extras)
    (edits,) = pack_edits([row], num_shards=1, capacity=EDITS_PER_TURN, vocab_size=VOCAB)
    shaped = edit(jnp.asarray(logits[None, None]), edits)[0]
    rows = settings(count, seed=np.arange(count))
    masks = np.broadcast_to(mask, (count, WORDS))
    tokens = np.asarray(draw(jnp.broadcast_to(shaped, (count, VOCAB)), masks, rows))
    allowed = allowed_tokens(mask)
    p = np.where(allowed, np.exp(plainly_edited(logits, params, extras)), 0)
    p /= p.sum()
    counts = np.bincount(tokens, minlength=VOCAB)
    assert not counts[~allowed].any()
    assert np.abs(counts - p * count).max() < 5 * np.sqrt(p.max() * count)


def test_nothing_is_edited_where_nothing_is_asked():
    history = [1, 2, 3]
    plain = LateRow(0, 0, SamplingParams(), SamplingExtras(None, history, 1))
    first = LateRow(0, 1, SamplingParams(presence_penalty=1.0), SamplingExtras(None, history, 3))
    empty = LateRow(0, 2, SamplingParams(repetition_penalty=2.0))
    for rows in ([plain], [plain, first], [plain, first, empty]):
        assert pack_edits(rows, num_shards=2, capacity=512, vocab_size=VOCAB) == []
        assert pack_masks(rows, (2, 4, WORDS)) is None


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_tokens_outside_the_vocabulary(token: int):
    """They would be another row's."""
    biased = LateRow(0, 0, SamplingParams(logit_bias=((max(token, 0), 1.0),)))
    said = LateRow(
        0, 0, SamplingParams(repetition_penalty=2.0), SamplingExtras(None, [3, token], 1)
    )
    for row in [said] + [biased] * (token > 0):
        with pytest.raises(ValueError, match=r"are not all in \[0, 141\)"):
            pack_edits([row], num_shards=1, capacity=512, vocab_size=VOCAB)


def test_masks_that_do_not_fit():
    def masks(mask: np.ndarray) -> None:
        pack_masks([LateRow(0, 0, SamplingParams(), SamplingExtras(mask))], (1, 1, WORDS))

    with pytest.raises(ValueError, match="allows no token"):
        masks(np.zeros(WORDS, np.uint32))
    with pytest.raises(ValueError, match="not uint32"):
        masks(np.ones(WORDS, np.int32))
    with pytest.raises(ValueError, match="not uint32"):
        masks(np.ones(WORDS - 1, np.uint32))


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64])
def test_edits_come_in_whole_turns(rows: int):
    assert max_edits(rows) % EDITS_PER_TURN == 0 and max_edits(rows) >= 256 * rows


def plain_logprobs(logits: np.ndarray) -> np.ndarray:
    """float64 log-softmax."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("vocab", [7, VOCAB, 64 * 20, 64 * 33])
@pytest.mark.parametrize("parts", [1, 4])
def test_logprobs(vocab: int, parts: int):
    """Value, rank, and the first of equals before the others, however the vocabulary is split."""
    vocab *= parts
    random = np.random.default_rng(vocab)
    function = logprobs_of
    if parts > 1:
        spec = PartitionSpec(None, None, "tensor")
        function = jax.jit(
            jax.shard_map(
                partial(token_logprobs, axis="tensor"),
                mesh=make_mesh(f"tensor={parts}"),
                in_specs=(spec, PartitionSpec()),
                out_specs=PartitionSpec(),
                check_vma=False,
            )
        )
    for spread, digits in ((1, 5), (3, 0), (0.2, 0), (20, 2), (0, 0)):
        logits = np.round(random.normal(0, spread, (ROWS, vocab)), digits).astype(np.float32)
        logits += 0.0  # no negative zeros: to a sort, they are less than zero
        tokens = random.integers(0, vocab, ROWS).astype(np.int32)
        tokens[::3] = logits.argmax(axis=1)[::3]
        packed = np.asarray(function(logits[None], tokens[None]))[0]
        expected = plain_logprobs(logits)
        for i, token in enumerate(tokens.tolist()):
            found = unpack_logprobs(token, packed[i], MAX_LOGPROBS)
            order = np.argsort(-logits[i], kind="stable")[:MAX_LOGPROBS]
            assert found.token_id == token
            assert found.rank == (logits[i] >= logits[i, token]).sum()
            assert found.top_ids == tuple(order.tolist())
            assert abs(found.logprob - expected[i, token]) < 1e-5 * max(1, spread)
            np.testing.assert_allclose(found.top_logprobs, expected[i, order], rtol=0, atol=2e-5)
            fewer = unpack_logprobs(token, packed[i], 3)
            assert fewer.top_ids == found.top_ids[:3]
            assert fewer.top_logprobs == found.top_logprobs[:3]
