"""Engines whose device takes no real time but moves a clock: benchmarks that end at once."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.bench.sides import Sides
from jaxserve.bench.stepping import Driver
from jaxserve.cache.disk_tier import DiskTier
from jaxserve.cache.page_store import PageStore
from jaxserve.core.config import EngineConfig
from jaxserve.core.step import StepPlan
from jaxserve.engine.engine import Engine
from jaxserve.prediction.base import LengthPredictor, OraclePredictor
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

    def sides(self, build: Callable[[EngineConfig], Engine] | None = None, **options: Any) -> Sides:
        """Engines of any config in this time; `options` are `virtual_engine`'s."""
        return Sides(
            build=build or (lambda config: virtual_engine(self, config, **options)),
            driver=self.driver,
        )


class VirtualExecutor(FakeExecutor):
    """A step takes a second, and a hundredth for every token in it; moving pages takes none."""

    STEP, TOKEN = 1.0, 0.01

    def __init__(self, time: VirtualTime, **options: Any) -> None:
        super().__init__(**options)
        self._time = time

    def launch(self, plan: StepPlan) -> FakeHandle:
        if plan.rows:
            self._time.now += self.STEP + self.TOKEN * plan.num_tokens
        return super().launch(plan)


class PromptKnowsLength(FakeModel):
    """Prompts [prompt length, answer length / 4, ...]: the answer ends with EOS at that length."""

    def next_token(self, history: Sequence[int] | np.ndarray, seed: int) -> int:
        assert self.eos_token_id is not None
        if len(history) - int(history[0]) + 1 >= 4 * int(history[1]):
            return self.eos_token_id
        return super().next_token(history, seed) % self.eos_token_id


def page_store(config: EngineConfig) -> PageStore | None:
    """The tiers of `config`, for pages of tokens."""
    host, disk = (int(2**30 * gib) for gib in (config.host_cache_memory, config.disk_cache_memory))
    tier = None
    if disk:
        assert config.disk_cache_dir is not None
        tier = DiskTier(Path(config.disk_cache_dir), 4 * config.page_size, "virtual", disk)
    if not host and not disk:
        return None
    return PageStore((config.page_size,), np.int32, host_bytes=host, disk=tier)


def virtual_engine(
    time: VirtualTime,
    config: EngineConfig | None = None,
    *,
    model: FakeModel | None = None,
    predictor: LengthPredictor | None = None,
    **options: Any,
) -> Engine:
    """An engine of `config`, or of `options`; small unless told otherwise.

    Without overlap, so that a step's tokens come when it ends.
    """
    small = dict(num_pages=512, page_size=4, max_model_len=512, max_num_seqs=16,
                 max_num_batched_tokens=128, overlap=False, prefix_cache=False)  # fmt: skip
    config = config or EngineConfig(**{**small, **options})
    model, store = model or FakeModel(vocab_size=256), page_store(config)
    executor = VirtualExecutor(time, page_size=config.page_size, model=model, store=store)
    if predictor is None and config.length_predictor == "oracle":
        predictor = OraclePredictor()
    return fake_sync_engine(
        config, model=model, executor=executor, store=store, predictor=predictor
    )
