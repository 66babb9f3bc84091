"""What the engine remembers of its steps and requests."""

import threading

import pytest

from jaxserve.core.request import FinishReason, Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.engine.engine import Engine
from jaxserve.engine.records import EngineRecords, RequestRecord, StepRecord, TokenTimes
from jaxserve.runner.buckets import Buckets
from jaxserve.testing.fake_engine import fake_sync_engine


class Notes:
    """An observer that writes everything down."""

    def __init__(self) -> None:
        self.steps: list[tuple[StepRecord, TokenTimes]] = []
        self.requests: list[RequestRecord] = []

    def step_done(self, step: StepRecord, times: TokenTimes) -> None:
        self.steps.append((step, times))

    def prompt_answered(self, n: int, num_tokens: int) -> None:
        pass

    def request_done(self, record: RequestRecord, request: Request) -> None:
        assert record.request_id == request.request_id
        self.requests.append(record)


def run(engine: Engine, until: float = 1000.0) -> None:
    """Step an engine on a clock that goes by whole seconds, until it is idle."""
    now = 1.0
    while engine.has_work and now < until:
        engine.step(now)
        now += 1.0


def add(engine: Engine, name: str, prompt: int, output: int, **service) -> None:
    params = SamplingParams(max_tokens=output, ignore_eos=True, seed=1)
    tokens = [ord(name[0])] * prompt  # no two share a prefix
    engine.add(name, tokens, params, ServiceParams(**service))


def make(**options) -> tuple[Engine, Notes]:
    engine = fake_sync_engine(overlap=False, step_seconds=0.0, **options)
    notes = Notes()
    engine.records.observe(notes)
    return engine, notes


def test_a_requests_times() -> None:
    engine, notes = make(max_num_batched_tokens=10, max_num_seqs=1)
    add(engine, "a", 25, 4, tenant="gold", traceparent="00-1")
    add(engine, "b", 3, 1)
    run(engine)
    a, b = notes.requests
    assert (a.request_id, a.tenant, a.traceparent) == ("a", "gold", "00-1")
    # Three chunks of the prompt, at 1, 2 and 3 s; then a token per second.
    assert (a.arrival, a.started) == (0.0, 1.0)
    assert [a.first_token, a.last_token, a.finished] == pytest.approx([3, 6, 6], abs=0.5)
    assert a.queue_seconds == 1.0
    assert a.prefill_seconds == pytest.approx(2, abs=0.5)
    assert a.decode_seconds == pytest.approx(3, abs=0.5)
    assert a.seconds_per_output_token == pytest.approx(1, abs=0.2)
    assert a.time_to_first_token == pytest.approx(3, abs=0.5)
    assert a.e2e_seconds == pytest.approx(6, abs=0.5)
    assert (a.num_prompt_tokens, a.num_output_tokens) == (25, 4)
    assert (a.max_tokens, a.asked_max_tokens) == (4, 4)
    assert a.finish_reason is FinishReason.LENGTH
    assert b.queue_seconds == pytest.approx(7, abs=0.5)
    assert b.seconds_per_output_token is None
    assert engine.records.requests() == [a, b]
    assert engine.records.requests(after=a.number) == [b]


def test_steps_and_their_tokens() -> None:
    engine, notes = make(max_num_batched_tokens=32)
    add(engine, "a", 5, 3)
    add(engine, "b", 6, 2)
    run(engine)
    steps = [step for step, _ in notes.steps]
    assert [s.num_tokens for s in steps] == [11, 2, 1]
    assert [s.num_rows for s in steps] == [2, 2, 1]
    assert [s.num_sampled for s in steps] == [2, 2, 1]
    assert [s.num_generated for s in steps] == [2, 2, 1]
    assert [s.number for s in steps] == [1, 2, 3]
    assert engine.records.steps() == steps
    assert engine.records.steps(after=2) == steps[2:]
    assert engine.records.steps(after=3) == []
    first, second, third = (times for _, times in notes.steps)
    assert first.first_tokens == pytest.approx([1, 1], abs=0.5)
    assert (first.gaps, first.num_prompt_tokens) == ({}, 11)
    assert second.first_tokens == [] and second.num_prompt_tokens == 0
    [(gap, count)] = second.gaps.items()
    assert gap == pytest.approx(1, abs=0.5) and count == 2
    assert sum(third.gaps.values()) == 1


def test_padding_is_known_where_there_are_buckets() -> None:
    engine, notes = make()
    buckets = Buckets((4, 16, 128), (1, 16), max_rows=16, max_pages=128)
    engine.records = EngineRecords(buckets)
    engine.records.observe(notes)
    add(engine, "a", 5, 2)
    add(engine, "b", 6, 2)
    run(engine)
    steps = [step for step, _ in notes.steps]
    assert [(s.token_bucket, s.row_bucket) for s in steps] == [(16, 16), (4, 16)]
    assert [s.num_padding_tokens for s in steps] == [5, 2]


def test_without_buckets_nothing_is_padding() -> None:
    engine, notes = make()
    add(engine, "a", 5, 2)
    run(engine)
    assert {step.num_padding_tokens for step, _ in notes.steps} == {0}


def test_aborted_before_and_after_the_first_token() -> None:
    engine, notes = make(max_num_seqs=1)
    add(engine, "runs", 5, 10)
    add(engine, "waits", 5, 10)
    engine.step(1.0)
    engine.step(2.0)
    engine.abort("waits")
    engine.abort("runs")
    waits, runs = notes.requests
    assert (waits.started, waits.first_token, waits.num_output_tokens) == (None, None, 0)
    assert waits.queue_seconds is None and waits.prefill_seconds is None
    assert waits.decode_seconds is None and waits.time_to_first_token is None
    assert waits.e2e_seconds == pytest.approx(2, abs=0.5)
    assert (runs.num_output_tokens, runs.finish_reason) == (2, FinishReason.ABORT)
    assert runs.decode_seconds == pytest.approx(1, abs=0.5)


def test_a_preempted_request_started_once() -> None:
    engine, notes = make(num_pages=8, page_size=4, max_model_len=32)
    add(engine, "a", 8, 20)
    add(engine, "b", 8, 20)
    run(engine)
    assert sum(r.num_preemptions for r in notes.requests) > 0
    assert {r.started for r in notes.requests} == {1.0}
    tokens = sum(sum(t.gaps.values()) + len(t.first_tokens) for _, t in notes.steps)
    assert tokens == 40


def test_only_the_last_ones_are_remembered() -> None:
    engine, _ = make()
    engine.records = EngineRecords(capacity=3)
    for i in range(5):
        add(engine, str(i), 2, 2)
        run(engine)
    assert [r.request_id for r in engine.records.requests()] == ["2", "3", "4"]
    assert [s.number for s in engine.records.steps()] == [8, 9, 10]
    assert [s.number for s in engine.records.steps(after=8)] == [9, 10]


def test_an_observer_that_raises_is_dropped(caplog) -> None:
    class Broken(Notes):
        def step_done(self, step: StepRecord, times: TokenTimes) -> None:
            raise RuntimeError("broken")

    engine, notes = make()
    engine.records.observe(Broken())
    add(engine, "a", 5, 2)
    run(engine)
    assert engine.records.observers == (notes,)
    assert len(notes.requests) == 1
    assert "told nothing any more" in caplog.text


def test_read_while_it_is_written() -> None:
    engine, _ = make(max_num_seqs=16)
    failures: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                numbers = [s.number for s in engine.records.steps()]
                assert numbers == sorted(numbers)
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(40):
        add(engine, str(i), 4, 20)
    run(engine)
    done.set()
    reader.join()
    assert not failures
