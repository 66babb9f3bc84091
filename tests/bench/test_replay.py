"""A trace replayed in simulated time, against an engine that really runs it on a virtual clock."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.bench.padding import record_steps
from jaxserve.bench.replay import at_utilisation, fit_lengths, replay, scale_lengths
from jaxserve.bench.step_time import LinearCost
from jaxserve.bench.stepping import TimedRequest, greedy
from jaxserve.bench.workloads import WorkloadItem
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError, InvalidRequest
from jaxserve.scheduling.policies import POLICIES
from jaxserve.testing.fake_engine import fake_sync_engine
from jaxserve.testing.fake_executor import FakeModel
from tests.bench.virtual import VirtualExecutor, VirtualTime

COST = LinearCost(VirtualExecutor.STEP, VirtualExecutor.TOKEN)
LIMITS = EngineConfig(
    page_size=4, num_pages=40, max_num_seqs=3, max_num_batched_tokens=16, max_model_len=64
)
ALONE = dataclasses.replace(LIMITS, overlap=False)


def item(arrival: float, prompt_len: int, output_len: int) -> WorkloadItem:
    rng = np.random.default_rng(prompt_len)
    return WorkloadItem(arrival, rng.integers(0, 250, prompt_len, np.int32), output_len)


def in_order(draws: list[tuple[int, int, int]]) -> list[WorkloadItem]:
    """Items of (tenths of a second, prompt, answer), never due at the very end of a step."""
    return [item(t / 10 + 7e-4 * (i + 1), *lens) for i, (t, *lens) in enumerate(sorted(draws))]


ITEMS = st.lists(
    st.tuples(st.integers(0, 300), st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=8
).map(in_order)


@settings(max_examples=40)
@given(ITEMS)
def test_the_same_steps_at_the_same_times_as_the_engine(items: list[WorkloadItem]):
    time = VirtualTime()
    engine = fake_sync_engine(
        executor=VirtualExecutor(time, page_size=4, model=FakeModel(vocab_size=256)),
        page_size=4, num_pages=40, max_num_seqs=3, max_num_batched_tokens=16, max_model_len=64,
        overlap=False,
    )  # fmt: skip
    steps = record_steps(engine)
    driver = time.driver(engine)
    driver.run(
        TimedRequest(
            request_id=str(index), prompt_token_ids=item.prompt_token_ids.tolist(),
            params=greedy(item.output_len), arrival=item.arrival or 0.0,
        )
        for index, item in enumerate(items)
    )  # fmt: skip
    records = [driver.records[str(index)] for index in range(len(items))]

    replayed = replay(items, ALONE, COST)
    assert replayed.steps.histogram.steps == steps.histogram.steps
    assert replayed.steps.unused_kv_fraction == steps.unused_kv_fraction
    assert replayed.latencies == pytest.approx([r.latency for r in records])
    assert replayed.ttfts == pytest.approx([r.ttft for r in records])
    tokens = sum(n * count for n, count in steps.histogram.tokens().items())
    steps_seconds = steps.histogram.num_steps * COST.base + tokens * COST.per_token
    assert replayed.busy_seconds == pytest.approx(steps_seconds)


@settings(max_examples=20)
@given(ITEMS)
def test_overlap_computes_the_same_tokens(items: list[WorkloadItem]):
    """Preempted requests compute theirs again: with room for all, every token just once."""
    limits = dataclasses.replace(LIMITS, num_pages=100, prefix_cache=False)
    replayed = replay(items, limits, COST)
    tokens = sum(n * count for n, count in replayed.steps.histogram.tokens().items())
    # The last token of an answer is never fed back.
    assert tokens == sum(len(i.prompt_token_ids) + i.output_len - 1 for i in items)
    sampled = sum(n * count for n, count in replayed.steps.histogram.sampled().items())
    assert sampled == sum(i.output_len for i in items)
    assert (replayed.latencies >= replayed.ttfts).all() and (replayed.ttfts > 0).all()
    assert replayed.busy_seconds <= replayed.seconds + 1e-9


def test_unused_slots_are_those_behind_the_last_token():
    replayed = replay([item(0, 5, 2)], ALONE, COST)
    # 5 tokens in 2 pages of 4, then 6.
    assert replayed.steps.kv_slots == 16 and replayed.steps.kv_tokens == 11
    assert replayed.steps.unused_kv_fraction == pytest.approx(5 / 16)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_can_be_replayed(policy: str):
    items = [item(0.5 * i, 5 + 7 * i % 30, 1 + i % 9) for i in range(12)]
    replayed = replay(items, dataclasses.replace(LIMITS, policy=policy), COST)
    assert len(replayed.latencies) == 12 and replayed.steps.histogram.num_steps > 10


def test_too_long_a_request_is_refused():
    with pytest.raises(InvalidRequest, match="leaves no room"):
        replay([item(0, 64, 1)], LIMITS, COST)


# ---------------------------------------------------------------------------- scaling


def test_lengths_are_scaled_and_fitted():
    items = [item(3, 100, 10), item(4, 3, 1)]
    scaled = scale_lengths(items, 0.25)
    assert [(len(i.prompt_token_ids), i.output_len) for i in scaled] == [(25, 2), (1, 1)]
    assert (scaled[0].prompt_token_ids == items[0].prompt_token_ids[:25]).all()
    fitted = fit_lengths([*items, item(5, 2, 99)], 20)
    assert [(len(i.prompt_token_ids), i.output_len) for i in fitted] == [(10, 10), (3, 1), (1, 19)]
    for factor in (0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="factor"):
            scale_lengths(items, factor)
    with pytest.raises(ConfigError, match="max_model_len 1"):
        fit_lengths(items, 1)


def test_utilisation_is_of_what_the_engine_can_do():
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.exponential(1.0, 200))
    items = [item(float(t), int(rng.integers(1, 30)), 5) for t in arrivals]
    spans = {}
    for utilisation in (0.3, 0.6):
        stretched = at_utilisation(items, utilisation, LIMITS, COST)
        assert stretched[0].arrival == 0
        spans[utilisation] = stretched[-1].arrival
        replayed = replay(stretched, LIMITS, COST)
        # Batches are smaller than at full load, so the device works for more of the time.
        assert utilisation < replayed.busy_seconds / replayed.seconds <= 1
    assert spans[0.3] == pytest.approx(2 * spans[0.6])
    with pytest.raises(ConfigError, match="positive"):
        at_utilisation(items, 0, LIMITS, COST)
    with pytest.raises(ConfigError, match="all arrive at once"):
        at_utilisation(items[:1], 0.5, LIMITS, COST)
