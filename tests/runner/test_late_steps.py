"""Late steps on a runner: tokens, log-probabilities and hidden states, on one and two shards."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxserve.core.errors import CompileAfterReady
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.step import SamplingExtras, StepPlan, StepRow
from jaxserve.runner.compile_counter import CompileCounter
from jaxserve.runner.logit_programs import max_edits
from jaxserve.runner.program_cache import CompileWatch
from tests.runner.small_runner import GREEDY, SmallRunner
from tests.runner.test_logit_programs import plain_logprobs
from tests.runner.test_memory import model_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiles")]

VOCAB = 1024
EVERY = np.full(VOCAB // 32, 2**32 - 1, np.uint32)


@pytest.fixture(scope="module", params=["", "data=2,tensor=2"])
def made(request: pytest.FixtureRequest, program_cache_dir: Path) -> Iterator[SmallRunner]:
    """A runner that must compile nothing any more."""
    config = dataclasses.replace(model_config("llama"), vocab_size=VOCAB)
    runner = SmallRunner(request.param, program_cache_dir, config, sampled=(1, 4))
    counter = CompileCounter(strict=True)
    watch = CompileWatch(counter)
    counter.ready()
    yield runner
    watch.close()
    runner.runner.close()


def only(*tokens: int) -> np.ndarray:
    """A mask that allows these tokens."""
    bits = np.zeros(VOCAB, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def random_rows(made: SmallRunner, random: np.random.Generator) -> list[StepRow]:
    """One to four rows of each shard, all kinds of settings, in any order."""
    rows = []
    for shard in range(made.last_shard + 1):
        for slot in range(random.integers(1, 5)):
            params = SamplingParams(
                temperature=random.choice([0.0, 0.7, 1.5]), top_k=int(random.choice([0, 5])),
                top_p=random.choice([1.0, 0.9]), min_p=random.choice([0.0, 0.05]),
            )  # fmt: skip
            prompt = random.integers(0, VOCAB, random.integers(1, 5)).tolist()
            rows.append(
                made.row(
                    prompt, (slot,), shard=shard, slot=slot, params=params,
                    seed=int(random.integers(2**32)),
                )
            )  # fmt: skip
    return [rows[i] for i in random.permutation(len(rows))]


def following(row: StepRow) -> StepRow:
    """The same request's next step, which takes its token from the device."""
    return row._replace(
        start=row.end, num_tokens=1, token_ids=(), page_ids=(*row.page_ids, row.slot % 4 + 4)
    )


def test_late_rows_without_extras_are_plain_rows(made: SmallRunner):
    """In this step and in the next, which reads their tokens from the last-token map."""
    random = np.random.default_rng(1)
    for _ in range(16):
        rows = random_rows(made, random)
        plain = made.step(*rows), made.step(*map(following, rows))
        late = [
            row._replace(late=bool(i == 0 or random.random() < 0.5)) for i, row in enumerate(rows)
        ]
        # The same if all of the sampler runs, for the sake of another row or of none.
        nothing = {0: SamplingExtras(EVERY, [1, 2], 1)} if random.random() < 0.5 else {}
        tokens = made.step(*late, extras=nothing), made.step(*map(following, late), extras={})
        assert tokens == plain


def test_a_row_is_shaped_alone_as_in_a_batch(made: SmallRunner):
    random = np.random.default_rng(2)
    changed = 0
    for _ in range(12):
        rows, extras = random_rows(made, random), {}
        plain = made.step(*rows)
        for i in range(len(rows)):
            params = dataclasses.replace(
                rows[i].params, repetition_penalty=random.choice([1.0, 3.0]),
                presence_penalty=random.choice([0.0, 2.0]), logprobs=int(random.integers(3)),
                logit_bias={int(t): 2.0 for t in random.integers(0, VOCAB, 30)},
            )  # fmt: skip
            rows[i] = rows[i]._replace(params=params, late=True)
            if random.random() < 0.7:
                mask = random.integers(0, 2**32, VOCAB // 32, np.uint32)
                history = random.integers(0, VOCAB, 600).tolist()
                extras[i] = SamplingExtras(mask if i % 2 else None, history, 300)
        together = made.result(*rows, extras=extras)
        for i, row in enumerate(rows):
            alone = made.result(row, extras={0: extras[i]} if i in extras else {})
            assert alone.token_ids[0] == together.token_ids[i]
            assert alone.logprobs[0].rank == together.logprobs[i].rank
            assert alone.logprobs[0].logprob == pytest.approx(
                together.logprobs[i].logprob, abs=1e-5
            )
            changed += bool(together.token_ids[i] != plain[i])
    assert changed > 10


def test_greedy_tokens_and_logprobs_are_those_of_numpy(made: SmallRunner):
    """Histories of more tokens than one call edits; raw log-probabilities beside shaped tokens."""
    random = np.random.default_rng(3)
    rows, extras = [], {}
    for i in range(4):
        params = dataclasses.replace(
            GREEDY, repetition_penalty=1.5 + i, frequency_penalty=0.3, presence_penalty=-0.4,
            logit_bias={5: 3.0, 900: -2.5}, logprobs=(None, 0, 4, 20)[i],
        )  # fmt: skip
        history = random.integers(0, VOCAB, 3000).tolist()
        extras[i] = SamplingExtras(EVERY if i == 2 else None, history, 1000)
        row = made.row([i, 7], (i,), slot=i, params=params, late=True, probe=True)
        rows.append(row)
    distinct = sum(len(set(e.history)) for e in extras.values())
    assert distinct > 2 * max_edits(4), "all fit one call"
    result = made.result(*rows, extras=extras)
    assert result.hidden is not None
    logits = made.logits(result.hidden)
    logprobs = plain_logprobs(logits)
    assert result.logprobs.keys() == {1, 2, 3}
    for i, row in enumerate(rows):
        shaped = logits[i].astype(np.float64)
        shaped[5] += 3.0
        shaped[900] -= 2.5
        seen = np.unique(extras[i].history)
        penalty = row.params.repetition_penalty
        shaped[seen] = np.where(shaped[seen] > 0, shaped[seen] / penalty, shaped[seen] * penalty)
        counts = np.bincount(extras[i].history[1000:], minlength=VOCAB)
        shaped -= 0.3 * counts - 0.4 * (counts > 0)
        token = int(result.token_ids[i])
        assert token == shaped.argmax()
        if row.params.logprobs is None:
            continue
        found = result.logprobs[i]
        assert found.token_id == token and abs(found.logprob - logprobs[i, token]) < 1e-5
        assert found.rank == (logits[i] >= logits[i, token]).sum()
        order = np.argsort(-logits[i], kind="stable")[: row.params.logprobs]
        assert found.top_ids == tuple(order.tolist())
        np.testing.assert_allclose(found.top_logprobs, logprobs[i, order], rtol=0, atol=1e-5)
    assert any(result.logprobs[i].rank > 1 for i in (1, 2, 3)), "nothing was penalised"


def test_masks_and_biases_decide(made: SmallRunner):
    """A mask has the last word, over biases too; a row of another request is left alone."""
    biased = SamplingParams(temperature=1.5, logit_bias={11: 100.0})
    rows = [
        made.row([1, 2], (0,), slot=0, params=SamplingParams(temperature=2), seed=5, late=True),
        made.row([3], (1,), slot=1, params=biased, late=True),
        made.row([4], (2,), slot=2, params=biased, late=True),
        made.row([5, 6], (3,), slot=3, params=SamplingParams(), seed=9),
    ]
    for _ in range(5):
        extras = {0: SamplingExtras(only(1023)), 2: SamplingExtras(only(0, 77))}
        first, second, third, _ = made.step(*rows, extras=extras)
        assert (first, second) == (1023, 11) and third in (0, 77)
        rows = [row._replace(seed=row.seed + 1) for row in rows]
    # Without its extras, a row whose request has ended does no harm.
    assert made.step(*rows, extras={})[1:3] == [11, 11]


def test_hidden_states_and_scores(made: SmallRunner):
    """The scores of all tokens of a prompt, more than one piece, are those of its logits."""
    random = np.random.default_rng(4)
    prompts = [random.integers(0, VOCAB, n).tolist() for n in (6, 1, 9)]
    rows = [
        made.row(prompts[0], (0, 1), slot=0, wants_hidden=True, probe=True),
        made.row(prompts[1], (2,), slot=1),
        made.row(prompts[2], (3, 4, 5), slot=2, wants_hidden=True, samples=False, probe=True),
    ]
    result = made.result(*rows)
    assert result.token_hidden.keys() == {0, 2} and result.hidden is not None
    for i, last in ((0, result.hidden[0]), (2, result.hidden[1])):
        hidden, prompt = result.token_hidden[i], prompts[i]
        assert hidden.dtype == np.float32 and hidden.shape == (len(prompt), 48)
        logprobs = plain_logprobs(made.logits(last[None]))[0]
        tokens = random.integers(0, VOCAB, len(prompt)).tolist()
        scored = made.runner.score(hidden, tokens, 3)
        assert [s.token_id for s in scored] == tokens
        assert abs(scored[-1].logprob - logprobs[tokens[-1]]) < 1e-5
        assert scored[-1].rank == (logprobs >= logprobs[tokens[-1]]).sum()
        assert scored[-1].top_ids == tuple(np.argsort(-logprobs)[:3].tolist())
        # Token by token, each is the last one of a shorter prompt.
        for n in range(1, len(prompt)):
            row = made.row(prompt[:n], (6, 7, 8), slot=3, probe=True)
            shorter = made.result(row).hidden
            assert shorter is not None
            logprobs = plain_logprobs(made.logits(shorter))[0]
            assert abs(scored[n - 1].logprob - logprobs[tokens[n - 1]]) < 1e-4
    many = np.tile(result.token_hidden[0], (7, 1))
    scored = made.runner.score(many, list(range(len(many))), 0)
    assert [s.token_id for s in scored] == list(range(len(many)))
    alone = [made.runner.score(many[i : i + 1], [i], 0)[0] for i in range(len(many))]
    for one, other in zip(scored, alone, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert one.top_ids == other.top_ids == ()
    assert made.runner.score(many[:0], [], 5) == []
    with pytest.raises(ValueError, match="hidden states"):
        made.runner.score(many, [1, 2], 0)
    with pytest.raises(ValueError, match="in"):
        made.runner.score(many[:1], [VOCAB], 0)
    assert not made.result(rows[1]).token_hidden


def test_a_late_step_whose_rows_do_not_sample(made: SmallRunner):
    row = made.row([1, 2, 3], (0,), samples=False, late=True, wants_hidden=True)
    result = made.result(row, extras={})
    assert result.token_ids.tolist() == [-1] and result.token_hidden[0].shape == (3, 48)


def test_out_of_turn(made: SmallRunner):
    """What must not happen is refused and harms nothing: the step can still be sampled."""
    rows = (made.row([1], (0,), slot=0, late=True), made.row([2], (1,), slot=1))
    runner = made.runner
    expected = made.step(*(row._replace(late=False) for row in rows))
    handle = runner.launch(StepPlan(rows))
    with pytest.raises(ValueError, match="not sampled yet"):
        runner.launch(StepPlan(rows))
    with pytest.raises(ValueError, match="not sampled yet"):
        runner.collect(handle)
    with pytest.raises(ValueError, match=r"rows \[1\] have extras"):
        runner.sample(handle, {1: SamplingExtras()})
    with pytest.raises(ValueError, match="no token at all"):
        runner.sample(handle, {0: SamplingExtras(EVERY * 0)})
    runner.sample(handle, {})
    with pytest.raises(ValueError, match="sampled already"):
        runner.sample(handle, {})
    assert runner.collect(handle).token_ids.tolist() == expected


def test_a_program_that_was_not_compiled_before(made: SmallRunner):
    """The watch of these tests would have seen it."""
    lowering = made.runner._lowering
    with pytest.raises(CompileAfterReady):
        lowering.late_logits(3).compile()
