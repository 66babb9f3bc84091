"""Two tenants in virtual time, and the arithmetic of what they receive."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.bench.fairness import (
    HEAVY,
    LIGHT,
    FairnessResult,
    ServiceMeter,
    ServicePoint,
    measure_fairness,
    proven_bound,
)
from jaxserve.bench.settings import FairnessSpec
from jaxserve.bench.stepping import SteppedRecord
from jaxserve.core.config import EngineConfig
from tests.bench.virtual import VirtualTime, virtual_engine

SPEC = FairnessSpec(light_requests=6, ratio=10, input_len=8, output_len=6, rounds=2)
CONFIG = EngineConfig(page_size=4, max_num_seqs=4, max_num_batched_tokens=32, overlap=False)


@pytest.fixture(scope="module")
def result() -> FairnessResult:
    return measure_fairness(CONFIG, SPEC, VirtualTime().sides())


def test_vtc_serves_both_alike_and_loses_no_throughput(result: FairnessResult) -> None:
    vtc, fcfs = result.sides["vtc"], result.sides["fcfs"]
    assert result.bound == 2 * 2 * 4 * 14
    assert vtc.difference <= result.bound
    assert fcfs.difference > 3 * vtc.difference
    assert vtc.heavy_service < 2 * vtc.light_service
    assert fcfs.heavy_service > 5 * fcfs.light_service
    assert vtc.token_throughput == pytest.approx(fcfs.token_throughput, rel=0.05)
    assert result.differing_answers == 0 and result.num_answers == 2 * 66


def test_the_curve_rises_while_both_wait(result: FairnessResult) -> None:
    for side in result.sides.values():
        for before, after in zip(side.curve, side.curve[1:], strict=False):
            assert all(a <= b for a, b in zip(before, after, strict=True))
        assert side.curve[0] == (0, 0, 0)
    # When the light tenant has no more waiting, nothing is counted any more.
    assert result.sides["vtc"].light_service <= 2 * 6 * (8 + 2 * 6)


def test_the_table_has_both_policies(result: FairnessResult) -> None:
    text = str(result)
    assert "\nvtc " in text and "\nfcfs " in text and "all 132 answers identical" in text


def record(name: str, prompt_len: int, num_tokens: int, now: float) -> SteppedRecord:
    return SteppedRecord(
        request_id=name, prompt_len=prompt_len, delta_times=[now] * num_tokens,
        delta_tokens=[1] * num_tokens,
    )  # fmt: skip


def test_service_of_a_hand_made_run() -> None:
    meter = ServiceMeter({LIGHT: 1, HEAVY: 2})
    tenants = {"l": LIGHT, "h": HEAVY, "i": HEAVY}
    meter.take(tenants, [record("h", 10, 1, 1.0)])  # 10 + 2
    meter.take(tenants, [record("h", 10, 2, 2.0)])  # 2
    meter.take(tenants, [record("h", 10, 3, 3.0), record("l", 5, 1, 3.0)])  # 2; 5 + 2
    meter.take(tenants, [record("h", 10, 4, 4.0)])  # the light one has nothing waiting now
    assert meter.points == [
        ServicePoint(0, 0, 0), ServicePoint(1, 0, 12), ServicePoint(2, 0, 14),
        ServicePoint(3, 7, 16),
    ]  # fmt: skip
    assert meter.difference == 14


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=30))
def test_the_difference_is_that_of_the_worst_stretch(steps: list[tuple[int, int]]) -> None:
    meter = ServiceMeter({LIGHT: 1, HEAVY: 1})
    light = heavy = 0
    for number, (more_light, more_heavy) in enumerate(steps):
        light, heavy = light + more_light, heavy + more_heavy
        meter.points.append(ServicePoint(number, light, heavy))
    stretches = [
        abs((b.heavy - a.heavy) - (b.light - a.light)) for a in meter.points for b in meter.points
    ]
    assert meter.difference == max(stretches)


def test_a_small_pool_bounds_the_batch() -> None:
    info = virtual_engine(VirtualTime(), num_pages=10, page_size=4, max_num_seqs=16).info
    assert proven_bound(info, SPEC) == 2 * 2 * 40
    assert proven_bound(info, FairnessSpec(input_len=500, output_len=1)) == 2 * 500
