"""The fake executor must notice plans that a device would compute nonsense from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jaxserve.cache.page_keys import page_key
from jaxserve.cache.page_store import PageStore
from jaxserve.core.request import Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.step import FetchDone, PageCopy, PageFetch, PageSave, StepPlan, StepRow
from jaxserve.testing.fake_executor import FakeExecutor, FakeModel

MODEL = FakeModel(vocab_size=10**6)
PROMPT = StepRow(
    key=0, slot=0, shard=0, start=0, num_tokens=5, token_ids=(1, 2, 3, 4, 5), page_ids=(3, 1),
    samples=True, params=SamplingParams(), seed=11,
)  # fmt: skip
DECODE = PROMPT._replace(start=5, num_tokens=1, token_ids=())
OTHER = PROMPT._replace(key=1, slot=1, page_ids=(5, 6))
NO_OP = (PageCopy(0, 20, 21),)
KEYS = [page_key(b"parent", [number]) for number in range(4)]


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
        ((PROMPT, OTHER._replace(slot=0)), "same slot"),
        ((PROMPT, OTHER._replace(key=0)), "same key"),
        ((PROMPT._replace(token_ids=(1, 2, 3)),), "3 token ids for 5"),
        ((PROMPT._replace(page_ids=(3,)),), "1 pages for 5"),
        ((PROMPT._replace(page_ids=(3, 3)),), "page twice: 3"),
        ((PROMPT, OTHER._replace(page_ids=(3, 6))), "two rows write page"),
        ((DECODE._replace(page_ids=(5, 1)), OTHER._replace(page_ids=(6, 5))), "number 0 of one"),
        (
            (
                PROMPT._replace(num_tokens=3, token_ids=(1, 2, 3), page_ids=(3,)),
                OTHER._replace(start=4, num_tokens=1, token_ids=(5,), page_ids=(3, 6)),
            ),
            "writes but not fills",
        ),
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


def test_a_row_may_read_a_page_that_another_fills_in_the_same_step() -> None:
    executor = FakeExecutor(page_size=4, model=MODEL)
    reader = OTHER._replace(start=4, num_tokens=1, token_ids=(5,), page_ids=(3, 6))
    handle = executor.launch(StepPlan((reader, PROMPT)))
    assert len(set(executor.collect(handle).token_ids.tolist())) == 1


class Moving:
    """An executor with a store, whose prompt's pages are 3 and 1."""

    def __init__(self, **options: Any) -> None:
        self.store = PageStore((4,), np.int32, host_bytes=1000)
        self.executor = FakeExecutor(page_size=4, model=MODEL, store=self.store, **options)
        self.token = self.step(PROMPT)

    def step(self, *rows: StepRow, **movements: Any) -> int:
        """Launch and collect; the first row's token, or -1."""
        for save in movements.get("saves", ()):
            self.store.expect(save.key)
        handle = self.executor.launch(StepPlan(rows, **movements))
        tokens = self.executor.collect(handle).token_ids.tolist()
        return tokens[0] if rows else -1

    def decode(self, *pages: int, **movements: Any) -> int:
        """The token after the prompt and its answer so far, read from these pages."""
        row = DECODE._replace(page_ids=pages, token_ids=(self.token,))
        return self.step(row, **movements)


@pytest.fixture
def moving() -> Moving:
    return Moving()


def test_saves_see_the_pages_before_copies_and_rows_do(moving: Moving) -> None:
    """Page 3 goes to the store and page 1 to page 7; then both are overwritten."""
    intruder = OTHER._replace(page_ids=(3, 1), token_ids=(9, 9, 9, 9, 9))
    moving.step(
        intruder, saves=(PageSave(0, 3, KEYS[0]),), copies=(PageCopy(0, 1, 7),),
        fetches=(PageFetch(1, 0, (8,), (KEYS[0],)),),
    )  # fmt: skip
    assert moving.executor.poll() == [FetchDone(1, 1)]
    expected = run(PROMPT, DECODE)[1]
    assert moving.decode(8, 7) == expected
    assert moving.decode(3, 7) != expected


@pytest.mark.parametrize("num_stored", [0, 1, 2])
def test_a_fetch_ends_at_the_first_page_that_the_store_lacks(
    moving: Moving, num_stored: int
) -> None:
    moving.step(saves=tuple(PageSave(0, 3, key) for key in KEYS[:num_stored]), copies=NO_OP)
    moving.step(fetches=(PageFetch(1, 0, (8, 9), tuple(KEYS[:2])),))
    assert moving.executor.poll(wait=True) == [FetchDone(1, num_stored)]
    assert (moving.decode(8, 1) == run(PROMPT, DECODE)[1]) == (num_stored > 0)


def test_fetches_take_as_many_polls_as_told_and_waiting_shortens_it() -> None:
    moving = Moving(fetch_polls=3)
    for ticket in range(3):
        moving.step(fetches=(PageFetch(ticket, 0, (8 + ticket,), (KEYS[0],)),))
    assert moving.executor.poll() == moving.executor.poll() == []
    assert moving.executor.poll(wait=True) == [FetchDone(i, 0) for i in range(3)]
    moving.step(fetches=(PageFetch(3, 0, (8,), (KEYS[0],)),))
    moving.step(fetches=(PageFetch(4, 0, (9,), (KEYS[0],)),))
    assert moving.executor.poll(wait=True) == [FetchDone(3, 0)]
    assert moving.executor.poll(wait=True) == [FetchDone(4, 0)]
    assert moving.executor.poll(wait=True) == []


@pytest.mark.parametrize(
    ("rows", "movements", "message"),
    [
        ((), {"saves": [PageSave(0, 3, KEYS[0]), PageSave(0, 1, KEYS[0])]}, "same key"),
        ((), {"copies": [PageCopy(0, 3, 7), PageCopy(0, 1, 7)]}, "same target"),
        ((), {"copies": [PageCopy(0, 3, 7), PageCopy(0, 7, 8)]}, "source of a copy and a target"),
        ((DECODE,), {"copies": [PageCopy(0, 7, 3)]}, "only reads page"),
        ((), {"fetches": [PageFetch(1, 0, (8, 9), (KEYS[0],))]}, "2 pages from 1 keys"),
        ((), {"fetches": [PageFetch(1, 0, (), ())]}, "0 pages from 0 keys"),
        ((), {"fetches": [PageFetch(1, 0, (8, 8), (KEYS[0], KEYS[1]))]}, "fill the same page"),
        ((), {"fetches": [PageFetch(0, 0, (8,), (KEYS[0],))]}, "ticket 0 already"),
        ((DECODE,), {"fetches": [PageFetch(1, 0, (1,), (KEYS[0],))]}, "of a row is being fetched"),
        # 30 is being fetched since an earlier plan.
        ((PROMPT._replace(page_ids=(3, 30)),), {}, "of a row is being fetched"),
        ((), {"fetches": [PageFetch(1, 0, (30,), (KEYS[0],))]}, "fill the same page"),
        ((), {"saves": [PageSave(0, 30, KEYS[0])]}, "of a save is being fetched"),
        ((), {"copies": [PageCopy(0, 30, 8)]}, "source is being fetched"),
        ((), {"copies": [PageCopy(0, 8, 30)]}, "target is being fetched"),
    ],
)
def test_a_contradiction_in_movements_is_refused(
    moving: Moving, rows: Sequence[StepRow], movements: dict[str, Any], message: str
) -> None:
    moving.step(fetches=(PageFetch(0, 0, (30,), (KEYS[3],)),))
    with pytest.raises(ValueError, match=message):
        moving.executor.launch(
            StepPlan(tuple(rows), **{name: tuple(each) for name, each in movements.items()})
        )


def test_without_a_store_nothing_is_saved_or_fetched() -> None:
    executor = FakeExecutor(page_size=4)
    for plan in (
        StepPlan((), saves=(PageSave(0, 3, KEYS[0]),)),
        StepPlan((), fetches=(PageFetch(1, 0, (8,), (KEYS[0],)),)),
    ):
        with pytest.raises(ValueError, match="no page store"):
            executor.launch(plan)
    assert executor.poll(wait=True) == []
    executor.close()


def test_close_gives_up_fetches_and_closes_the_store(moving: Moving) -> None:
    moving.step(fetches=(PageFetch(1, 0, (8,), (KEYS[0],)),))
    moving.executor.close()
    moving.executor.close()
    assert moving.executor.poll(wait=True) == []
    assert not moving.store.expect(KEYS[0])


def test_probed_rows_bring_hidden_states() -> None:
    executor = FakeExecutor(page_size=4)
    plain = executor.collect(executor.launch(StepPlan((PROMPT, OTHER))))
    assert plain.hidden is None
    rows = (DECODE, DECODE._replace(key=7, slot=2, page_ids=(8, 9), probe=True))
    hidden = executor.collect(executor.launch(StepPlan(rows))).hidden
    assert hidden is not None and hidden.dtype == np.float32
    assert hidden.tolist() == [[7, 6]]
