"""Log-probabilities of prompts, and embeddings: from hidden states, chunk by chunk."""

import asyncio
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.errors import Draining, InvalidRequest, QueueFull, RequestFailed
from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.request import FinishReason
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.engine import Engine
from jaxserve.engine.outputs import Embedding, TokenDelta
from jaxserve.engine.prompt_states import PromptPooler, PromptScorer
from jaxserve.testing.fake_executor import FakeModel, made_up_logprobs
from tests.engine.harness import assert_idle, fake_engine, greedy, prompts

MODEL = FakeModel(vocab_size=256)
SCHEDULES: list[dict[str, Any]] = [
    {},
    {"overlap": False},
    {"num_pages": 20, "max_model_len": 60},
    {"max_num_batched_tokens": 3},
]


def engine(**options: Any) -> Engine:
    return fake_engine(**{"model": MODEL, **options})


def serve(under: Engine) -> list[TokenDelta]:
    deltas: list[TokenDelta] = []
    while under.has_work:
        deltas += under.step(float(len(deltas)))
        under._scheduler.check()
    assert_idle(under)
    return deltas


def watch_scores(under: Engine) -> list[tuple[np.ndarray, list[int]]]:
    """Notes what the executor is asked to score."""
    asked: list[tuple[np.ndarray, list[int]]] = []
    score = under.executor.score

    def spy(hidden: np.ndarray, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
        asked.append((hidden, list(token_ids)))
        return score(hidden, token_ids, num_top)

    under.executor.score = spy  # type: ignore[method-assign]
    return asked


@pytest.mark.parametrize("options", SCHEDULES)
def test_prompt_logprobs(options: dict[str, Any]):
    """Each token after the first once, after the right state, on the first delta only."""
    under = engine(**options)
    asked = watch_scores(under)
    given = prompts(25, 40)
    for i, prompt in enumerate(given):
        under.add(f"r{i}", prompt, greedy(15, prompt_logprobs=2 if i % 3 else None))
    deltas = serve(under)
    for i, prompt in enumerate(given):
        mine = [delta.prompt_logprobs for delta in deltas if delta.request_id == f"r{i}"]
        expected = tuple(made_up_logprobs(token, 2, 256) for token in prompt[1:])
        assert mine[0] == (expected if i % 3 else None)
        assert not any(mine[1:])
    scored = sum(len(prompt) - 1 for i, prompt in enumerate(given) if i % 3)
    assert sum(len(ids) for _, ids in asked) == scored  # also if their prompts ran twice
    if "num_pages" in options:
        assert under.load().num_preemptions > 0


def test_states_belong_to_the_tokens_before():
    under = engine(max_num_batched_tokens=5)
    asked = watch_scores(under)
    prompt = list(range(100, 117))
    under.add("r", prompt, greedy(3, prompt_logprobs=0))
    serve(under)
    states = np.concatenate([hidden for hidden, _ in asked])
    assert states.tolist() == [[token, i] for i, token in enumerate(prompt[:-1])]
    assert [token for _, ids in asked for token in ids] == prompt[1:]


def test_a_prompt_of_one_token_has_none():
    under = engine()
    under.add("r", [5], greedy(2, prompt_logprobs=3))
    assert [delta.prompt_logprobs for delta in serve(under)] == [(), None]


def test_nothing_is_taken_from_the_cache():
    prompt = list(range(40))
    under = engine()
    under.add("warm", prompt, greedy(2))
    serve(under)
    under.add("plain", prompt, greedy(2))
    assert serve(under)[-1].num_cached_tokens > 30
    under.add("scored", prompt, greedy(2, prompt_logprobs=0))
    first, last = serve(under)
    assert len(first.prompt_logprobs or ()) == 39 and last.num_cached_tokens == 0


@pytest.mark.parametrize("num_tokens", [1, 40, 64])
def test_a_prompt_can_be_scored_without_an_answer(num_tokens: int):
    under = engine()
    under.add("r", list(range(num_tokens)), greedy(0, prompt_logprobs=1))
    [delta] = serve(under)
    assert len(delta.prompt_logprobs or ()) == num_tokens - 1
    assert (delta.text, delta.token_ids, delta.num_output_tokens) == ("", (), 0)
    assert delta.finish_reason is FinishReason.LENGTH
    with pytest.raises(InvalidRequest, match="max_tokens must be at least 1"):
        greedy(0)
    assert greedy(0, prompt_logprobs=1).of_answer(2).prompt_logprobs == 1
    assert greedy(1, prompt_logprobs=1).of_answer(2).prompt_logprobs is None


def test_later_readers_of_deltas_get_the_prompts_too():
    async def main() -> list[TokenDelta]:
        stream = under.generate("r", [1, 2, 3], greedy(6, prompt_logprobs=1, logprobs=0))
        deltas = [await anext(stream)]
        await asyncio.sleep(0.1)  # the rest comes as one delta
        return deltas + [delta async for delta in stream]

    under = AsyncEngine(engine(step_seconds=0.005))
    try:
        deltas = asyncio.run(main())
    finally:
        under.shutdown()
    assert len(deltas) < 6
    assert [len(delta.prompt_logprobs or ()) for delta in deltas] == [2, *[0] * (len(deltas) - 1)]
    assert all([lp.token_id for lp in d.logprobs] == list(d.token_ids) for d in deltas)


# Embeddings.


def expected_embedding(prompt: list[int], pooling: str = "mean") -> np.ndarray:
    states = np.array([(token, i) for i, token in enumerate(prompt)], np.float64)
    pooled = states.mean(axis=0) if pooling == "mean" else states[-1]
    return pooled / np.linalg.norm(pooled)


@pytest.mark.parametrize("options", SCHEDULES)
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings(options: dict[str, Any], pooling: str):
    under = engine(embedding_pooling=pooling, **options)
    given = prompts(25, 40)
    for i, prompt in enumerate(given):
        if i % 4:
            under.add_embedding(f"r{i}", [1, *prompt])
        else:
            under.add(f"r{i}", prompt, greedy(20))
    deltas = serve(under)
    for i, prompt in enumerate(given):
        if i % 4:
            [delta] = [delta for delta in deltas if delta.request_id == f"r{i}"]
            assert delta.embedding is not None and delta.token_ids == ()
            values, num_tokens = delta.embedding
            assert num_tokens == len(prompt) + 1 and values.dtype == np.float32
            np.testing.assert_allclose(values, expected_embedding([1, *prompt], pooling), rtol=1e-5)
    assert under.load().num_generated_tokens == 20 * 7


@given(st.lists(st.integers(1, 7), min_size=1, max_size=9), st.integers(0, 2**32))
def test_states_may_come_again_and_in_any_chunks(chunks: list[int], seed: int):
    """A preempted request starts over, cut differently: each state counts once all the same."""
    random = Random(seed)
    prompt = [random.randrange(200) for _ in range(sum(chunks))]
    states = np.array([[token, 1.0] for token in prompt], np.float32)
    pooler = PromptPooler(prompt, "mean")
    scored: list[int] = []

    def score(hidden: np.ndarray, ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
        scored.extend(hidden[:, 0].astype(int).tolist())
        return [made_up_logprobs(token, num_top, 256) for token in ids]

    scorer = PromptScorer(prompt, 0, score)
    while not pooler.is_complete:
        start = 0
        for size in chunks:
            pooler.take(start, states[start : start + size])
            scorer.take(start, states[start : start + size])
            start += size
            if random.random() < 0.3:
                break
        random.shuffle(chunks)
    assert scored == prompt[:-1] and scorer.is_complete
    assert [lp.token_id for lp in scorer.logprobs] == prompt[1:]
    total = states.sum(axis=0)
    np.testing.assert_allclose(pooler.embedding().values, total / np.linalg.norm(total), rtol=1e-5)


def test_embeddings_over_asyncio():
    async def main() -> list[Embedding]:
        calls = [under.embed(None, prompt) for prompt in given]
        return await asyncio.gather(*calls)

    given = [[3, *prompt] for prompt in prompts(30, 30)]
    under = AsyncEngine(engine())
    try:
        results = asyncio.run(main())
    finally:
        under.shutdown()
    for prompt, result in zip(given, results, strict=True):
        np.testing.assert_allclose(result.values, expected_embedding(prompt), rtol=1e-5)
    assert_idle(under._engine)


def test_a_cancelled_embedding_frees_its_pages():
    async def main() -> None:
        task = asyncio.ensure_future(under.embed("e", [1] * 10_000))
        while not under.load().num_running:
            await asyncio.sleep(0.002)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        steps = under.load().num_steps
        while under.load().num_running or under.load().num_used_pages:
            await asyncio.sleep(0.002)
        assert under.load().num_steps - steps <= 3
        assert under.load().num_aborted == 1

    under = AsyncEngine(engine(step_seconds=0.01, max_model_len=20_000, num_pages=6000))
    try:
        asyncio.run(asyncio.wait_for(main(), 20))
    finally:
        under.shutdown()


def test_embeddings_are_refused_like_answers():
    async def main() -> None:
        with pytest.raises(InvalidRequest, match="the prompt is empty"):
            await under.embed(None, [])
        with pytest.raises(InvalidRequest, match="65 tokens, which is more than fits"):
            await under.embed(None, [1] * 65)
        busy = asyncio.ensure_future(under.embed("a", [1] * 60))
        while not under.load().num_running:
            await asyncio.sleep(0.001)
        with pytest.raises(InvalidRequest, match="'a' is already in use"):
            await under.embed("a", [2])
        waiting = asyncio.ensure_future(under.embed("b", [3]))
        while not under.load().num_waiting:
            await asyncio.sleep(0.001)
        with pytest.raises(QueueFull):
            await under.embed(None, [4])
        under.abort("b")
        with pytest.raises(RequestFailed, match="aborted"):
            await waiting
        await busy
        await under.drain(5)
        with pytest.raises(Draining):
            await under.embed(None, [1])

    under = AsyncEngine(
        engine(max_num_seqs=1, max_waiting=1, step_seconds=0.03, max_num_batched_tokens=4)
    )
    try:
        asyncio.run(asyncio.wait_for(main(), 20))
    finally:
        under.shutdown()
    assert_idle(under._engine)
