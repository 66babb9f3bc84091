"""The engine behind asyncio: streams, cancelling, draining, and what happens when it breaks."""

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from jaxserve.core.errors import Draining, EngineDead, InvalidRequest, QueueFull
from jaxserve.core.request import FinishReason, Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.step import StepPlan, StepResult
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.testing.fake_executor import FakeExecutor, FakeModel
from tests.engine.harness import assert_idle, fake_engine, greedy

MODEL = FakeModel(vocab_size=256)
PATIENCE = 20.0  # seconds; no test needs more than a fraction of it


@contextlib.contextmanager
def running(**options: Any) -> Iterator[AsyncEngine]:
    """An AsyncEngine over a fake device, stopped in the end."""
    engine = AsyncEngine(fake_engine(model=MODEL, **options))
    try:
        yield engine
    finally:
        engine.shutdown()


def go(main: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(main, PATIENCE))  # type: ignore[arg-type]


def expected(prompt: list[int], max_tokens: int) -> list[int]:
    return MODEL.generate(
        Request(request_id="", prompt_token_ids=prompt, params=greedy(1), max_tokens=max_tokens)
    )


async def collect(engine: AsyncEngine, prompt: list[int], params: SamplingParams) -> list[int]:
    return [
        token async for delta in engine.generate(None, prompt, params) for token in delta.token_ids
    ]


async def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.002)


def is_idle(engine: AsyncEngine) -> bool:
    load = engine.load()
    return load.num_running == load.num_waiting == 0 and load.num_used_pages == 0


@pytest.mark.parametrize("overlap", [True, False])
def test_concurrent_streams(overlap: bool):
    async def main() -> None:
        prompts = [[i, i + 1, 7] * (1 + i % 5) for i in range(30)]
        answers = await asyncio.gather(*(collect(engine, p, greedy(9)) for p in prompts))
        assert list(answers) == [expected(p, 9) for p in prompts]
        await until(lambda: is_idle(engine))

    with running(overlap=overlap) as engine:
        go(main())
        assert engine.load().num_finished == 30 and engine.load().num_aborted == 0
    assert_idle(engine._engine)


def test_several_event_loops():
    """A server and a notebook may share an engine: each gets its own deltas."""
    results: dict[int, list[int]] = {}

    def caller(number: int) -> None:
        results[number] = asyncio.run(collect(engine, [number] * 3, greedy(8)))

    with running() as engine:
        threads = [threading.Thread(target=caller, args=(i,)) for i in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert results == {i: expected([i] * 3, 8) for i in range(5)}


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_leaving_a_stream_frees_its_pages(how: str):
    async def main() -> None:
        stream = engine.generate("mine", [1] * 8, greedy(10_000))
        await anext(stream)  # type: ignore[arg-type]
        assert engine.load().num_running == 1
        if how == "close":
            await stream.aclose()  # type: ignore[attr-defined]
        else:
            task = asyncio.ensure_future(anext(stream))  # type: ignore[arg-type]
            await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                while True:
                    await task
                    task = asyncio.ensure_future(anext(stream))  # type: ignore[arg-type]
                    await asyncio.sleep(0)
                    task.cancel()
        steps = engine.load().num_steps
        await until(lambda: is_idle(engine))
        assert engine.load().num_steps - steps <= 3
        assert engine.load().num_aborted == 1

    with running(step_seconds=0.01, max_model_len=20_000, num_pages=6000) as engine:
        go(main())


def test_abort_from_outside():
    async def main() -> None:
        assert not engine.abort("nobody")
        stream = engine.generate("victim", [1, 2], greedy(10_000))
        deltas = [await anext(stream)]  # type: ignore[arg-type]
        assert engine.abort("victim")
        deltas += [delta async for delta in stream]
        assert deltas[-1].finish_reason is FinishReason.ABORT
        received = [t for d in deltas for t in d.token_ids]
        assert received == expected([1, 2], len(received))
        assert deltas[-1].num_output_tokens == len(received)
        await until(lambda: is_idle(engine))

    with running(step_seconds=0.005, max_model_len=20_000, num_pages=6000) as engine:
        go(main())


def test_refusals_come_before_the_first_delta():
    async def main() -> None:
        with pytest.raises(InvalidRequest, match="the prompt is empty"):
            await collect(engine, [], greedy(3))
        first = engine.generate("a", [1], greedy(60))
        await anext(first)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="'a' is already in use"):
            async for _ in engine.generate("a", [2], greedy(3)):
                pass
        waiting = asyncio.ensure_future(collect(engine, [3], greedy(2)))
        await until(lambda: engine.load().num_waiting == 1)
        with pytest.raises(QueueFull):
            await collect(engine, [4], greedy(2))
        await first.aclose()  # type: ignore[attr-defined]
        # The refused twin must not have taken the first one's stream with it.
        assert await waiting == expected([3], 2)

    with running(max_num_seqs=1, max_waiting=1, step_seconds=0.01) as engine:
        go(main())


def test_drain_lets_running_requests_finish():
    async def main() -> None:
        tasks = [asyncio.ensure_future(collect(engine, [i], greedy(20))) for i in range(3)]
        await until(lambda: engine.load().num_running == 3)
        draining = asyncio.ensure_future(engine.drain(PATIENCE))
        await asyncio.sleep(0)
        assert not engine.is_ready
        with pytest.raises(Draining):
            await collect(engine, [9], greedy(2))
        await draining
        assert all(task.done() for task in tasks)
        assert [task.result() for task in tasks] == [expected([i], 20) for i in range(3)]

    with running(step_seconds=0.005) as engine:
        go(main())


def test_drain_aborts_what_takes_too_long():
    async def main() -> None:
        stream = engine.generate(None, [1], greedy(10_000))
        deltas = [await anext(stream)]  # type: ignore[arg-type]

        async def rest() -> None:
            deltas.extend([delta async for delta in stream])

        reading = asyncio.ensure_future(rest())
        started = time.monotonic()
        await engine.drain(0.1)
        assert time.monotonic() - started < 5
        await reading
        assert deltas[-1].finish_reason is FinishReason.ABORT
        assert is_idle(engine)

    with running(step_seconds=0.005, max_model_len=20_000, num_pages=6000) as engine:
        go(main())


def test_shutdown_ends_every_stream():
    async def main() -> None:
        tasks = [asyncio.ensure_future(collect(engine, [i], greedy(10_000))) for i in range(6)]
        await until(lambda: engine.load().num_running == 4)
        await asyncio.to_thread(engine.shutdown)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineDead) for result in results), results
        assert not engine.is_ready

    with running(step_seconds=0.005, max_model_len=20_000, num_pages=20_000) as engine:
        go(main())
    engine.shutdown()  # idempotent


class BrokenDevice:
    """A device that fails in the middle of serving."""

    def __init__(self, *, fails_at: int, method: str = "collect") -> None:
        self._device = FakeExecutor(page_size=4, model=MODEL)
        self._fails_at = fails_at
        self._method = method
        self._calls = 0

    def _count(self, method: str) -> None:
        self._calls += method == self._method
        if self._calls >= self._fails_at:
            raise RuntimeError("the device fell off the bus")

    def launch(self, plan: StepPlan) -> Any:
        self._count("launch")
        return self._device.launch(plan)

    def collect(self, handle: Any) -> StepResult:
        self._count("collect")
        return self._device.collect(handle)


@pytest.mark.parametrize("method", ["launch", "collect"])
@pytest.mark.parametrize("fails_at", [1, 5])
def test_a_broken_device_fails_every_stream(method: str, fails_at: int):
    async def main() -> None:
        tasks = [asyncio.ensure_future(collect(engine, [i], greedy(50))) for i in range(9)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineDead) for result in results), results
        await until(lambda: not engine.is_ready)
        with pytest.raises(EngineDead) as caught:  # dead, and not merely draining
            await collect(engine, [1], greedy(1))
        assert "fell off the bus" in str(caught.value.__cause__)
        await engine.drain(1.0)  # comes back
        engine.abort("anything")

    with running(executor=BrokenDevice(fails_at=fails_at, method=method)) as engine:
        go(main())


class DiesBeforePut:
    """An inbox whose engine dies between a caller's check for life and its put."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine, self._inbox = engine, engine._inbox
        engine._inbox = self  # type: ignore[assignment]

    def put(self, command: Any) -> None:
        from jaxserve.engine.async_engine import _Stop

        self._inbox.put(_Stop())
        self._engine._thread.join()
        self._inbox.put(command)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inbox, name)


def test_a_request_that_comes_as_the_loop_dies_does_not_wait_for_ever():
    async def main() -> None:
        DiesBeforePut(engine)
        with pytest.raises(EngineDead):
            await asyncio.wait_for(collect(engine, [1], greedy(3)), 5)

    with running() as engine:
        go(main())


def test_requests_racing_a_failure_all_end():
    for seed in range(15):
        number = random.Random(seed).randint(1, 6)

        async def main() -> None:
            async def late(delay: float) -> object:
                await asyncio.sleep(delay)
                return await collect(engine, [1, 2], greedy(4))

            tasks = [asyncio.ensure_future(late(i * 0.0004)) for i in range(25)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            good = expected([1, 2], 4)
            assert all(r == good or isinstance(r, EngineDead) for r in results), results

        with running(executor=BrokenDevice(fails_at=number * 4)) as engine:
            go(main())


def test_a_closed_event_loop_does_not_stop_the_others():
    async def abandon() -> None:
        stream = engine.generate("orphan", [5], greedy(10_000))
        await anext(stream)  # type: ignore[arg-type]
        streams.append(stream)  # kept, so that nothing closes it

    streams: list[Any] = []
    with running(step_seconds=0.002, max_model_len=20_000, num_pages=6000) as engine:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(abandon())
        loop.close()
        answer = asyncio.run(asyncio.wait_for(collect(engine, [8], greedy(5)), PATIENCE))
        assert answer == expected([8], 5)
        assert engine.abort("orphan")
        go(until(lambda: is_idle(engine)))
        streams.clear()
