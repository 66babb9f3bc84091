"""The driver: arrivals, latencies worked out by hand, and what it leaves behind."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.bench.report import summarize
from jaxserve.bench.stepping import Driver, TimedRequest, greedy
from jaxserve.core.errors import InvalidRequest, JaxserveError
from jaxserve.core.request import FinishReason
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.testing.fake_executor import FakeModel
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer
from tests.bench.virtual import VirtualTime, virtual_engine


def request(name: str, prompt_len: int, num_tokens: int, arrival: float = 0.0) -> TimedRequest:
    prompt = [len(name) + i for i in range(prompt_len)]
    return TimedRequest(
        request_id=name, prompt_token_ids=prompt, params=greedy(num_tokens), arrival=arrival
    )


def test_latencies_of_a_hand_made_run() -> None:
    """One request of 10 tokens in and 3 out; another falls due in its second step."""
    time = VirtualTime()
    driver = time.driver(virtual_engine(time, max_num_batched_tokens=100))
    result = driver.run([request("late", 20, 2, arrival=1.5), request("early", 10, 3)])
    early, late = driver.records["early"], driver.records["late"]
    # Steps: 10 tokens (till 1.10), 1 (2.11), 1 + 20 (3.32), 1 (4.33).
    assert [r.request_id for r in driver.records.values()] == ["early", "late"]
    assert early.delta_times == pytest.approx([1.10, 2.11, 3.32])
    assert early.ttft == pytest.approx(1.10) and early.latency == pytest.approx(3.32)
    assert early.tpot == pytest.approx((3.32 - 1.10) / 2)
    assert late.start == 1.5 and late.ttft == pytest.approx(3.32 - 1.5)
    assert late.tpot == pytest.approx(1.01)
    assert result.duration == pytest.approx(4.33)
    assert result.records == (early, late)
    assert len(early.token_ids) == 3 and early.finish_reason is FinishReason.LENGTH
    summary = summarize(result)
    assert summary["mean_ttft_ms"] == pytest.approx(1000 * (1.10 + 1.82) / 2)
    assert summary["completed"] == 2 and summary["total_output_tokens"] == 5


def test_an_idle_engine_waits_for_the_next_request() -> None:
    time = VirtualTime()
    driver = time.driver(virtual_engine(time))
    driver.run([request("a", 5, 1), request("b", 5, 1, arrival=50.0)])
    assert driver.records["b"].ttft == pytest.approx(1.05)
    assert driver.now() == pytest.approx(51.05)


def test_one_token_has_no_tpot_and_no_token_no_latency() -> None:
    time = VirtualTime()
    driver = time.driver(virtual_engine(time))
    assert driver.serve("one", [1, 2], greedy(1)).tpot is None
    record = driver.add(request("none", 4, 4))
    assert record.ttft is record.latency is record.tpot is None
    driver.stop()
    assert record.finish_reason is FinishReason.ABORT and not record.is_complete
    assert record.latency is None
    assert not driver.engine.has_work


def test_serve_counts_from_now_and_the_answer_may_end_early() -> None:
    time = VirtualTime()
    model = FakeModel(vocab_size=258, eos_token_id=ByteTokenizer.EOS, eos_probability=1.0)
    driver = time.driver(virtual_engine(time, model=model))
    time.sleep(7.0)
    record = driver.serve("x", [3, 4, 5], SamplingParams(temperature=0, max_tokens=9))
    assert record.start == pytest.approx(7.0) and record.latency == pytest.approx(1.03)
    assert record.finish_reason is FinishReason.STOP and record.token_ids == [ByteTokenizer.EOS]


def test_stopping_leaves_an_engine_that_goes_on() -> None:
    time = VirtualTime()
    driver = time.driver(virtual_engine(time, overlap=True))
    for i in range(3):
        driver.add(request(f"r{i}", 30, 50))
    for _ in range(4):
        driver.step()
    driver.stop()
    load = driver.engine.load()
    assert load.num_running == load.num_waiting == 0
    assert load.num_used_pages == 0
    assert driver.serve("next", [9, 9], greedy(2)).is_complete


def test_what_an_engine_refuses_ends_the_run() -> None:
    time = VirtualTime()
    driver = time.driver(virtual_engine(time, max_model_len=16))
    with pytest.raises(InvalidRequest):
        driver.run([request("long", 16, 1)])
    driver.serve("x", [1], greedy(1))
    with pytest.raises(JaxserveError, match="used before"):
        driver.serve("x", [1], greedy(1))


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.floats(0, 60), st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=25
    ),
    st.booleans(),
)
def test_everyone_is_served_after_their_time(
    shapes: list[tuple[float, int, int]], overlap: bool
) -> None:
    time = VirtualTime()
    driver = time.driver(virtual_engine(time, max_num_seqs=3, overlap=overlap))
    seen: list[str] = []
    result = driver.run(
        [request(f"r{i}", n, m, arrival=t) for i, (t, n, m) in enumerate(shapes)],
        on_step=lambda changed: seen.extend(r.request_id for r in changed if r.is_complete),
    )
    assert sorted(seen) == sorted(driver.records)
    arrivals = [record.start for record in driver.records.values()]
    assert arrivals == sorted(t for t, _, _ in shapes)
    for record in driver.records.values():
        _, prompt_len, num_tokens = shapes[int(record.request_id[1:])]
        assert record.prompt_len == prompt_len and record.output_len == num_tokens
        assert record.ttft is not None and record.ttft >= 1 + prompt_len / 100 - 1e-9
        assert record.delta_times == sorted(record.delta_times)
    assert result.duration == pytest.approx(
        max(r.delta_times[-1] for r in driver.records.values()) - min(arrivals)
    )


def test_a_driver_takes_the_machines_own_clock() -> None:
    driver = Driver(virtual_engine(VirtualTime()))
    record = driver.serve("x", [1, 2, 3], greedy(2))
    assert 0 <= record.start <= record.delta_times[0] <= driver.now() < 60
