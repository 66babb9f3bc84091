"""Engines whose device takes no real time but moves a clock: benchmarks that end at once."""

import math
from typing import Any

from jaxserve.bench.stepping import Driver
from jaxserve.core.step import StepPlan
from jaxserve.engine.engine import Engine
from jaxserve.testing.fake_engine import fake_sync_engine
from jaxserve.testing.fake_executor import FakeExecutor, FakeHandle, FakeModel


class VirtualTime:
    """A clock that only moves when somebody sleeps or a step is launched."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now = max(self.now + seconds, math.nextafter(self.now, math.inf))

    def driver(self, engine: Engine) -> Driver:
        return Driver(engine, clock=self, sleep=self.sleep)


class VirtualExecutor(FakeExecutor):
    """A step takes a second, and a hundredth for every token in it."""

    STEP, TOKEN = 1.0, 0.01

    def __init__(self, time: VirtualTime, *, page_size: int, model: FakeModel | None = None):
        super().__init__(page_size=page_size, model=model)
        self._time = time

    def launch(self, plan: StepPlan) -> FakeHandle:
        self._time.now += self.STEP + self.TOKEN * plan.num_tokens
        return super().launch(plan)


def virtual_engine(
    time: VirtualTime, *, page_size: int = 4, model: FakeModel | None = None, **options: Any
) -> Engine:
    """Without overlap, so that a step's tokens come when it ends."""
    executor = VirtualExecutor(time, page_size=page_size, model=model or FakeModel(vocab_size=256))
    options = {"overlap": False, **options}
    return fake_sync_engine(executor=executor, page_size=page_size, **options)
