"""The fake executor must notice plans that a device would compute nonsense from."""

from typing import Any

import pytest

from jaxserve.core.request import Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.step import StepPlan, StepRow
from jaxserve.testing.fake_executor import FakeExecutor, FakeModel

MODEL = FakeModel(vocab_size=10**6)
PROMPT = StepRow(
    key=0, slot=0, shard=0, start=0, num_tokens=5, token_ids=(1, 2, 3, 4, 5), page_ids=(3, 1),
    samples=True, params=SamplingParams(), seed=11,
)  # fmt: skip
DECODE = PROMPT._replace(start=5, num_tokens=1, token_ids=())


def run(*rows: StepRow) -> list[int]:
    executor = FakeExecutor(page_size=4, model=MODEL)
    handles = [executor.launch(StepPlan((row,))) for row in rows]
    return [int(executor.collect(handle).token_ids[0]) for handle in handles]


def test_tokens_are_the_oracles() -> None:
    request = Request(
        request_id="r", prompt_token_ids=[1, 2, 3, 4, 5], params=SamplingParams(), max_tokens=2,
        seed=11,
    )  # fmt: skip
    oracle = MODEL.generate(request)
    assert run(PROMPT, DECODE) == oracle
    first = PROMPT._replace(num_tokens=3, token_ids=(1, 2, 3), page_ids=(3,), samples=False)
    second = PROMPT._replace(start=3, num_tokens=2, token_ids=(4, 5))
    known = DECODE._replace(token_ids=(oracle[0],))
    assert run(first, second, known) == [-1, *oracle]


@pytest.mark.parametrize(
    "mistake",
    [
        {"page_ids": (1, 3)},
        {"page_ids": (3, 2)},
        {"shard": 1},
        {"slot": 1},
        {"start": 4},
        {"start": 6},
        {"seed": 12},
        {"token_ids": (9,)},
    ],
)
def test_a_mistake_changes_the_token(mistake: dict[str, Any]) -> None:
    assert run(PROMPT, DECODE._replace(**mistake))[1] != run(PROMPT, DECODE)[1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "without rows"),
        ((PROMPT, PROMPT._replace(key=1)), "same slot"),
        ((PROMPT, PROMPT._replace(slot=1)), "same key"),
        ((PROMPT._replace(token_ids=(1, 2, 3)),), "3 token ids for 5"),
        ((PROMPT._replace(page_ids=(3,)),), "1 pages for 5"),
    ],
)
def test_a_contradiction_is_refused(rows: tuple[StepRow, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FakeExecutor(page_size=4).launch(StepPlan(rows))


def test_steps_are_collected_once_and_in_order() -> None:
    executor = FakeExecutor(page_size=4)
    first, second = executor.launch(StepPlan((PROMPT,))), executor.launch(StepPlan((DECODE,)))
    with pytest.raises(ValueError, match="not the next"):
        executor.collect(second)
    executor.collect(first)
    with pytest.raises(ValueError, match="not the next"):
        executor.collect(first)


def test_greedy_ignores_the_seed_and_eos_comes_as_often_as_asked() -> None:
    greedy = PROMPT._replace(params=SamplingParams(temperature=0.0))
    assert run(greedy) == run(greedy._replace(seed=99)) != run(PROMPT)
    model = FakeModel(vocab_size=20, eos_token_id=4, eos_probability=0.25)
    tokens = [model.next_token([i], seed=0) for i in range(2000)]
    assert 0.2 < tokens.count(4) / 2000 < 0.3
    assert set(tokens) == set(range(20))


def test_a_pretended_step_takes_its_time() -> None:
    executor = FakeExecutor(page_size=4, step_seconds=0.02)
    handles = [executor.launch(StepPlan((row,))) for row in (PROMPT, DECODE)]
    assert handles[1].done_at - handles[0].done_at >= 0.0199
    executor.collect(handles[0])
    executor.collect(handles[1])
