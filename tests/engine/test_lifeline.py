"""A step that fails half-way is an engine's last; what is asked of it afterwards says so."""

from typing import Any

import pytest

from jaxserve.core.errors import EngineDead
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.testing.fake_engine import fake_sync_engine
from jaxserve.testing.fake_executor import FakeExecutor


class Failing(FakeExecutor):
    """A device that fails at its second step, in the call that is named."""

    def __init__(self, call: str) -> None:
        super().__init__(page_size=4)
        self.num_closed = 0
        self._call, self._real = call, getattr(self, call)
        self._num_calls = 0
        setattr(self, call, self._fail)

    def _fail(self, argument: Any) -> Any:
        self._num_calls += 1
        if self._num_calls == 2:
            raise RuntimeError("XLA says no")
        return self._real(argument)

    def close(self) -> None:
        self.num_closed += 1
        super().close()


@pytest.mark.parametrize("call", ["launch", "collect"])
def test_a_failed_step_leaves_an_engine_that_says_so(call: str) -> None:
    executor = Failing(call)
    engine = fake_sync_engine(executor=executor)
    engine.add("a", [1, 2, 3], SamplingParams(temperature=0))
    with pytest.raises(RuntimeError, match="XLA says no"):
        while True:
            engine.step(0.0)
    assert not engine.has_work
    assert engine.abort("a") is None
    for call_again in (
        lambda: engine.add("b", [1], SamplingParams()),
        lambda: engine.add_embedding("c", [1]),
        lambda: engine.step(1.0),
    ):
        with pytest.raises(EngineDead, match=r"has failed \(RuntimeError: XLA says no\).*new one"):
            call_again()
    engine.close()
    engine.close()
    assert executor.num_closed == 1


def test_a_closed_engine_says_so() -> None:
    engine = fake_sync_engine()
    engine.close()
    with pytest.raises(EngineDead, match="closed"):
        engine.add("a", [1], SamplingParams())
