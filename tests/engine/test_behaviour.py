"""What a request may ask for, on a real runner with a tiny model."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.core.errors import InvalidRequest, QueueFull
from jaxserve.core.grammar import Grammar
from jaxserve.core.request import FinishReason
from jaxserve.core.sampling_params import SamplingParams, ThinkingBudget
from jaxserve.engine.engine import Engine
from tests.engine.harness import (
    assert_idle,
    build,
    fake_engine,
    greedy,
    prompts,
    run,
    tokens,
)
from tests.models.numpy_reference import NumpyModel

pytestmark = pytest.mark.usefixtures("quick_compiles")

MAX_MODEL_LEN = 96
LIMITS: dict[str, Any] = {
    "max_num_seqs": 8, "max_num_batched_tokens": 16, "max_model_len": MAX_MODEL_LEN,
    "token_buckets": "4,16", "row_buckets": "4,8",
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tiny_model: Callable[..., Path]) -> Path:
    # Untied: with tied embeddings a tiny random model says its last token again and again.
    return tiny_model("gemma3", tie_word_embeddings=False)


@pytest.fixture(scope="module", params=[True, False], ids=["overlap", "no-overlap"])
def engine(request: pytest.FixtureRequest, directory: Path, program_cache_dir: Path) -> Engine:
    return build(
        directory, overlap=request.param, num_pages=200, max_waiting=300,
        compilation_cache_dir=str(program_cache_dir), **LIMITS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def small_pool(directory: Path, program_cache_dir: Path) -> Engine:
    """An engine that preempts as soon as a few requests run."""
    return build(
        directory, num_pages=25, max_waiting=300, compilation_cache_dir=str(program_cache_dir),
        **LIMITS,
    )  # fmt: skip


def test_greedy_equals_the_dense_model(engine: Engine, small_pool: Engine, directory: Path):
    """Chunked prompts, decodes, preemption: all the same as float64 without any of it."""
    reference = NumpyModel(directory)
    requests = [(prompt, greedy(25)) for prompt in prompts(10, 60)]
    expected = [reference.greedy(prompt, 25) for prompt, _ in requests]
    assert len({t for answer in expected for t in answer}) > 20, "too plain to tell a fault"
    assert tokens(run(engine, requests)) == expected
    before = small_pool.load().num_preemptions
    assert tokens(run(small_pool, requests)) == expected
    assert small_pool.load().num_preemptions > before


def test_seeded_requests_do_not_depend_on_their_company(engine: Engine, small_pool: Engine):
    base = SamplingParams(max_tokens=20, ignore_eos=True)
    settings = [
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 11},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 0.7, "min_p": 0.05, "top_p": 0.95, "top_k": 50},
    ]
    requests = [
        (prompt, dataclasses.replace(base, seed=i * 2**33 + i, **settings[i % 4]))
        for i, prompt in enumerate(prompts(12, 40, seed=1))
    ]
    alone = [run(engine, [request])[0].token_ids for request in requests]
    assert len({tuple(answer) for answer in alone}) == len(alone)
    assert tokens(run(engine, requests)) == alone
    assert tokens(run(engine, requests[::-1])) == alone[::-1]
    strangers = [(prompt, greedy(17)) for prompt in prompts(5, 30, seed=2)]
    assert tokens(run(engine, strangers + requests))[5:] == alone
    before = small_pool.load().num_preemptions
    assert tokens(run(small_pool, requests)) == alone
    assert small_pool.load().num_preemptions > before


def test_seeds(engine: Engine):
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    answers = tokens(run(engine, [([1, 2, 3], params)] * 3))
    assert len({tuple(a) for a in answers}) == 3, "requests without a seed must differ"
    high, low = (dataclasses.replace(params, seed=s) for s in (2**63 + 1, 1))
    answers = tokens(run(engine, [([1, 2, 3], low), ([1, 2, 3], high), ([1, 2, 3], low)]))
    assert answers[0] == answers[2] != answers[1], "the seed's upper half counts"


def test_max_tokens_and_length(engine: Engine):
    (one,) = run(engine, [([1, 2], greedy(1))])
    assert len(one.token_ids) == 1 and one.finish_reason is FinishReason.LENGTH
    # Up to the context length and no further, whatever was asked for.
    for params in (greedy(10_000), dataclasses.replace(greedy(1), max_tokens=None)):
        (answer,) = run(engine, [([7] * 90, params)])
        assert len(answer.token_ids) == MAX_MODEL_LEN - 90
        assert answer.finish_reason is FinishReason.LENGTH
    (last,) = run(engine, [([7] * (MAX_MODEL_LEN - 1), greedy(50))])
    assert len(last.token_ids) == 1


def test_stop_token_ids(engine: Engine):
    prompt = [3, 1, 4, 1, 5]
    (free,) = run(engine, [(prompt, greedy(20))])
    stop = free.token_ids[7]
    first = free.token_ids.index(stop)
    # A request's stop tokens hold even when the model's own EOS is ignored.
    (stopped,) = run(engine, [(prompt, greedy(20, stop_token_ids=(stop, 999_999)))])
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.finish_reason is FinishReason.STOP
    assert free.text.startswith(stopped.text)


def test_eos_and_ignore_eos(directory: Path, program_cache_dir: Path):
    """A prompt whose greedy answer holds the model's EOS ends there unless told otherwise."""
    engine = build(directory, num_pages=200, compilation_cache_dir=str(program_cache_dir), **LIMITS)
    (free,) = run(engine, [([9, 2, 6], greedy(20))])
    eos = free.token_ids[5]
    engine.info = dataclasses.replace(engine.info, eos_token_ids=(eos,))
    params = [greedy(20), greedy(20, ignore_eos=False)]
    ignored, ended = run(engine, [([9, 2, 6], p) for p in params])
    assert ignored.token_ids == free.token_ids
    assert ended.token_ids == free.token_ids[: free.token_ids.index(eos) + 1]
    assert ended.finish_reason is FinishReason.STOP


def printable(engine: Engine, count: int) -> tuple[list[int], list[int]]:
    """A prompt whose greedy answer has a printable stretch of `count` tokens, and the answer."""
    for prompt in prompts(60, 9, seed=4):
        (answer,) = run(engine, [(prompt, greedy(24))])
        for at in range(3, 24 - count):
            if all(32 < t < 127 for t in answer.token_ids[at : at + count]):
                return prompt, answer.token_ids
    raise AssertionError("no printable answer: change the seed")


def test_stop_strings_across_tokens(engine: Engine):
    """With one token per byte, a stop string of three characters spans three tokens."""
    prompt, free = printable(engine, 3)
    at = next(i for i in range(3, 22) if all(32 < t < 127 for t in free[i : i + 3]))
    stop = bytes(free[at : at + 3]).decode()
    whole = run(engine, [(prompt, greedy(24))])[0].text
    end = whole.index(stop)
    params = [
        greedy(24, stop=(stop,)),
        greedy(24, stop=("never comes", stop)),
        greedy(24, stop=(stop + "\0 not this",)),  # begins like it, and is given back
    ]
    stopped, either, neither = run(engine, [(prompt, p) for p in params])
    for answer in (stopped, either):
        assert answer.text == whole[:end]
        assert answer.finish_reason is FinishReason.STOP
        assert answer.token_ids == free[: len(answer.token_ids)]
        assert len(answer.token_ids) <= at + 3
    assert neither.text == whole and neither.finish_reason is FinishReason.LENGTH


def test_invalid_prompts(engine: Engine):
    vocab = engine.info.vocab_size
    for prompt, message in (
        ([], "the prompt is empty"),
        ([1, -1], "must be in"),
        ([vocab], "must be in"),
        ([1] * MAX_MODEL_LEN, "leaves no room to answer"),
        ([1] * 100_000, "leaves no room to answer"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            engine.add("bad", prompt, greedy(1))
    assert_idle(engine)
    assert tokens(run(engine, [([vocab - 1, 0], greedy(2))]))[0]


def test_the_same_id_twice(engine: Engine):
    engine.add("twin", [1, 2], greedy(3))
    with pytest.raises(InvalidRequest, match="'twin' is already in use"):
        engine.add("twin", [1, 2], greedy(3))
    assert engine.abort("twin") is not None
    assert engine.abort("twin") is None
    run(engine, [])


def test_a_request_that_the_pool_can_never_hold(directory: Path):
    engine = fake_engine(num_pages=4, page_size=4, max_model_len=64)
    with pytest.raises(InvalidRequest, match="do not fit the KV cache of 16 tokens"):
        engine.add("r", [1] * 10, greedy(20))
    assert len(run(engine, [([1] * 10, greedy(7))])[0].token_ids) == 7


def test_queue_full():
    engine = fake_engine(max_waiting=2)
    for name in "ab":
        engine.add(name, [1], greedy(1))
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        engine.add("c", [1], greedy(1))
    while engine.has_work:
        engine.step(0.0)
    engine.add("c", [1], greedy(1))


def test_abort_frees_pages_at_once(engine: Engine):
    engine.add("long", [1] * 40, greedy(50))
    engine.add("other", [2] * 10, greedy(8))
    others: list[int] = []
    for _ in range(6):
        others += [t for d in engine.step(0.0) if d.request_id == "other" for t in d.token_ids]
    held = engine.load().num_used_pages
    assert held >= 10
    delta = engine.abort("long")
    assert delta is not None and delta.finish_reason is FinishReason.ABORT
    assert engine.load().num_used_pages <= 5, "the other request's pages only"
    engine._scheduler.check()
    while engine.has_work:
        for d in engine.step(0.0):
            assert d.request_id == "other", "a token of an aborted request"
            others += d.token_ids
    assert_idle(engine)
    assert others == run(engine, [([2] * 10, greedy(8))])[0].token_ids


def test_storm(engine: Engine, small_pool: Engine):
    """200 random requests, some aborted at random; the others answer as they do alone."""
    random = np.random.default_rng(8)
    for target in (engine, small_pool):
        before = target.load()
        pending = list(enumerate(prompts(100, 50, seed=9)))
        answers: dict[str, list[int]] = {}
        finished: set[str] = set()
        active: list[str] = []
        settings: dict[str, SamplingParams] = {}
        aborted = 0
        while pending or target.has_work:
            while pending and random.random() < 0.5:
                number, prompt = pending.pop()
                name = f"r{number}"
                settings[name] = SamplingParams(
                    temperature=float(random.choice([0, 1])), seed=number,
                    max_tokens=int(random.integers(1, 30)), ignore_eos=bool(number % 2),
                )  # fmt: skip
                target.add(name, prompt, settings[name])
                answers[name] = []
                active.append(name)
            for delta in target.step(0.0):
                answers[delta.request_id] += delta.token_ids
                if delta.finish_reason is not None:
                    finished.add(delta.request_id)
                    active.remove(delta.request_id)
            if active and random.random() < 0.15:
                name = active.pop(random.integers(len(active)))
                assert target.abort(name) is not None
                aborted += 1
            target._scheduler.check()
        assert_idle(target)
        load = target.load()
        assert aborted > 10
        assert load.num_aborted - before.num_aborted == aborted
        assert load.num_finished - before.num_finished == len(finished) == 100 - aborted
        by_name = {f"r{n}": prompt for n, prompt in enumerate(prompts(100, 50, seed=9))}
        for name in sorted(finished)[::7]:
            alone = run(target, [(by_name[name], settings[name])])[0].token_ids
            assert answers[name] == alone, name


def test_rules_of_sampling(engine: Engine, small_pool: Engine):
    """Masks, penalties and biases on the device: the same with preemption, and all kept."""
    letters = Grammar("regex", "[a-f]{2,9}")
    kinds = [
        SamplingParams(seed=7, max_tokens=25, grammar=letters),
        greedy(25, bad_words=("a", "bc"), allowed_token_ids=tuple(range(90, 110))),
        greedy(25, frequency_penalty=2.0, presence_penalty=2.0, allowed_token_ids=(5, 6, 7)),
        greedy(25, logit_bias={9: 100.0}),
        greedy(25, thinking=ThinkingBudget(4, (1,), (2, 3), begins_inside=True)),
        greedy(25),
    ]
    requests = [(prompt, kinds[i % 6]) for i, prompt in enumerate(prompts(18, 50))]
    answers = run(engine, requests)
    before = small_pool.load().num_preemptions
    assert tokens(run(small_pool, requests)) == tokens(answers)
    assert small_pool.load().num_preemptions > before
    for answer in answers[::6]:
        assert re.fullmatch("[a-f]{2,9}", answer.text) and answer.finish_reason == "stop"
    for answer in answers[1::6]:
        assert set(answer.token_ids) <= set(range(90, 110)) - {97}
        assert "bc" not in answer.text
    for answer in answers[2::6]:  # whatever was said counts against saying it again
        assert max(Counter(answer.token_ids).values()) < 20 and len(set(answer.token_ids)) == 3
    assert all(set(answer.token_ids) == {9} for answer in answers[3::6])
    assert all(answer.token_ids[4:6] == [2, 3] for answer in answers[4::6])


def test_prompts_are_scored_and_pooled(engine: Engine, small_pool: Engine, directory: Path):
    """Over chunks and preemption: log-probabilities of the dense model, and equal embeddings."""
    reference = NumpyModel(directory)
    given = [[3, *prompt] for prompt in prompts(6, 60, seed=2)]
    vectors = []
    for under in (engine, small_pool):
        for i, prompt in enumerate(given):
            under.add(f"r{i}", prompt, greedy(20, prompt_logprobs=3))
            under.add_embedding(f"e{i}", prompt)
        deltas = []
        while under.has_work:
            deltas += under.step(0.0)
        assert_idle(under)
        vectors.append(
            np.stack([d.embedding.values for d in sorted(deltas, key=lambda d: d.request_id)
                      if d.embedding is not None])
        )  # fmt: skip
        for i, prompt in enumerate(given):
            [scored] = [d.prompt_logprobs for d in deltas
                        if d.request_id == f"r{i}" and d.prompt_logprobs is not None]  # fmt: skip
            logits = reference.logits(prompt)
            expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            assert len(scored) == len(prompt) - 1
            for at, token, row in zip(scored, prompt[1:], expected, strict=False):
                assert at.token_id == token
                assert at.logprob == pytest.approx(row[token], abs=1e-3)
                top = np.sort(row)[::-1][:3]
                assert at.top_logprobs == pytest.approx(top, abs=1e-3)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors[0], axis=1), 1, rtol=1e-5)
