"""Callers that come and go in any thread, and are interrupted anywhere, leave a sound engine."""

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.core.errors import EngineDead
from jaxserve.engine.engine import Engine
from jaxserve.engine.shared_engine import SHARED_ENGINE_THREAD
from jaxserve.testing.fake_engine import fake_sync_engine
from tests.waiting import eventually

SHORT = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LLM]:
    """Makes an `LLM` without a device; takes the options of `fake_sync_engine`."""

    def make(**options: Any) -> LLM:
        engine = fake_sync_engine(**{"step_seconds": 0.0, **options})
        monkeypatch.setattr("jaxserve.llm.build_sync_engine", lambda _: engine)
        return LLM("fake")

    return make


def texts(llm: LLM, *prompts: str, params: SamplingParams = SHORT) -> list[str]:
    return [result.outputs[0].text for result in llm.generate(prompts, params, use_tqdm=False)]


def assert_idle(llm: LLM) -> None:
    load = llm.load()
    assert (load.num_running, load.num_waiting, load.num_used_pages) == (0, 0, 0)
    assert not llm._shared._calls and not llm._shared._owners


AROUND = (LLM._run.__code__, LLM.stream.__code__)


class Interrupt:
    """Raises in this thread at one of the bytecodes that the caller's side executes."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __enter__(self) -> "Interrupt":
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _arg: object) -> Any:
        code = frame.f_code
        if not code.co_filename.endswith("shared_engine.py") and code not in AROUND:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace


def run_generate(llm: LLM) -> None:
    texts(llm, "one", "two")


def run_stream(llm: LLM) -> None:
    stream = llm.stream("one", LONG)
    try:
        for _ in zip(range(2), stream, strict=False):
            pass
    finally:
        stream.close()


@pytest.mark.parametrize("run", [run_generate, run_stream])
def test_an_interrupt_at_any_bytecode(make: Callable[..., LLM], run: Callable[[LLM], None]) -> None:
    llm = make()
    expected = texts(llm, "what")
    at = 0
    is_cut = True
    while is_cut:
        at += 1
        try:
            with Interrupt(at) as interrupt:
                run(llm)
        except KeyboardInterrupt:
            pass
        is_cut = interrupt.left <= 0
        assert texts(llm, "what") == expected
        assert_idle(llm)
    assert at > 200


def test_who_leaves_without_a_word_is_taken_out(make: Callable[..., LLM]) -> None:
    """As by a second Ctrl-C while the first one is dealt with."""
    llm = make()

    def leave(_call: object) -> None:
        raise KeyboardInterrupt

    stream = llm.stream("one", LONG)
    next(stream)
    real = llm._shared._leave
    llm._shared._leave = leave  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stream.close()
    llm._shared._leave = real  # type: ignore[method-assign]
    assert llm.load().num_running == 1
    assert texts(llm, "what")
    assert_idle(llm)


def test_what_one_caller_raises_costs_others_nothing(
    make: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make()
    expected = [delta.token_ids for delta in llm.stream("hello", SHORT)]
    stream = llm.stream("hello", SHORT)
    got = [next(stream).token_ids]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="mine"):
        patch.setattr("jaxserve.llm.append", raises)
        texts(llm, "one", "two")
    got += [delta.token_ids for delta in stream]
    assert got == expected
    assert_idle(llm)


def raises(*_: object, **__: object) -> None:
    raise RuntimeError("mine")


def test_a_failed_step_is_told_to_everybody(make: Callable[..., LLM]) -> None:
    llm = make()
    stream = llm.stream("hello", LONG)
    next(stream)
    llm._engine.executor.launch = raises  # type: ignore[method-assign]
    with pytest.raises((RuntimeError, EngineDead), match="mine"):
        texts(llm, "one")
    with pytest.raises((RuntimeError, EngineDead), match="mine"):
        list(stream)
    with pytest.raises(EngineDead, match="mine"):
        texts(llm, "one")
    llm.close()


def test_closing_it_ends_the_calls_of_other_threads(make: Callable[..., LLM]) -> None:
    llm = make(step_seconds=0.05)
    ended: list[str] = []

    def call() -> None:
        try:
            texts(llm, "one", params=LONG)
        except EngineDead as error:
            ended.append(str(error))

    callers = [threading.Thread(target=call) for _ in range(3)]
    stream = llm.stream("one", LONG)
    next(stream)
    for caller in callers:
        caller.start()
    for _ in zip(range(2), stream, strict=False):
        pass
    llm.close()
    for caller in callers:
        caller.join()
    with pytest.raises(EngineDead, match="closed"):
        list(stream)
    assert ended == ["the engine is closed"] * 3
    llm.close()


def test_a_full_queue_is_waited_for(make: Callable[..., LLM]) -> None:
    llm = make(max_waiting=2, max_num_seqs=1)
    alone = [texts(llm, prompt) for prompt in "abcdef"]
    suspended = [llm.stream(prompt, LONG) for prompt in "gh"]
    for stream in suspended:
        next(stream)
    assert texts(llm, *"abcdef") == [text for [text] in alone]
    assert next(llm.stream("a", SHORT)).text == alone[0][0][:1]
    for stream in suspended:
        stream.close()
    assert_idle(llm)


def test_a_stream_collected_as_garbage_during_a_step(
    make: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make()
    step = Engine.step

    def collecting(engine: Engine, now: float) -> Any:
        monkeypatch.setattr(Engine, "step", step)
        gc.collect()
        return step(engine, now)

    stream = llm.stream("hello", LONG)
    next(stream)
    cycle: list[object] = [stream]
    cycle.append(cycle)
    del stream, cycle
    monkeypatch.setattr(Engine, "step", collecting)
    assert texts(llm, "one")
    assert_idle(llm)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    eventually(lambda: all(t.name != SHARED_ENGINE_THREAD for t in threading.enumerate()))
