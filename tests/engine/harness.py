"""Runs an engine to the end on the test's thread, checking its books after every step."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxserve.core.config import EngineConfig
from jaxserve.core.request import FinishReason
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.build import build_sync_engine
from jaxserve.engine.engine import Engine
from jaxserve.engine.outputs import TokenDelta
from jaxserve.testing.fake_engine import fake_sync_engine
from jaxserve.testing.fake_executor import FakeModel

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


@dataclasses.dataclass
class Answer:
    """All deltas of one request put together."""

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None

    def take(self, delta: TokenDelta) -> None:
        assert self.finish_reason is None, "a delta after the last one"
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.finish_reason = delta.finish_reason
        assert delta.num_output_tokens == len(self.token_ids)


def greedy(max_tokens: int, **fields: Any) -> SamplingParams:
    return dataclasses.replace(GREEDY, max_tokens=max_tokens, **fields)


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of 1 to `longest` - 1 tokens."""
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, random.integers(1, longest)).tolist() for _ in range(count)]


def run(
    engine: Engine,
    requests: Sequence[tuple[Sequence[int], SamplingParams]],
    *,
    check: bool = True,
    on_step: Callable[[int], None] = lambda step: None,
) -> list[Answer]:
    """Serve all requests at once; afterwards the engine must be empty."""
    answers = {f"r{i}": Answer() for i in range(len(requests))}
    for name, (prompt, params) in zip(answers, requests, strict=True):
        engine.add(name, prompt, params)
    step = 0
    while engine.has_work:
        for delta in engine.step(float(step)):
            answers[delta.request_id].take(delta)
        if check:
            engine._scheduler.check()
        on_step(step)
        step += 1
        assert step < 100_000, "the engine makes no progress"
    assert_idle(engine)
    assert all(answer.finish_reason is not None for answer in answers.values())
    return list(answers.values())


def tokens(answers: Sequence[Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


def assert_idle(engine: Engine) -> None:
    """Nothing is held by anybody."""
    load = engine.load()
    assert load.num_running == load.num_waiting == 0
    assert load.num_used_pages == 0
    assert not engine._streams
    engine._scheduler.check()


def build(model: object, **options: Any) -> Engine:
    """A real engine, small and with a single bucket of tokens and of rows unless told otherwise.

    Most of what such an engine takes is compiling; None asks for the server's own buckets.
    """
    limits: dict[str, Any] = dict(
        max_num_seqs=4, max_num_batched_tokens=8, num_pages=256, page_size=4
    )
    limits |= options
    limits.setdefault("token_buckets", str(limits["max_num_batched_tokens"]))
    limits.setdefault("row_buckets", str(limits["max_num_seqs"]))
    return build_sync_engine(EngineConfig(model=str(model), **limits), progress=False)


@contextlib.contextmanager
def maker(model: object, **defaults: Any) -> Iterator[Callable[..., Engine]]:
    """Gives a function that builds real engines of one model; they are closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> Engine:
            engine = build(model, **(defaults | options))
            stack.callback(engine.close)
            return engine

        yield make


def fake_engine(**options: Any) -> Engine:
    """An engine over a hash function instead of a device; small unless told otherwise."""
    limits: dict[str, Any] = dict(
        num_pages=64, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, max_waiting=100,
        step_seconds=0.0,
    )  # fmt: skip
    return fake_sync_engine(**{"model": FakeModel(vocab_size=256), **limits, **options})
