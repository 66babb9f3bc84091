"""Learned predictors as the engine uses them: learning, refining, threads, files, compiles."""

import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxserve.core.errors import ConfigError
from jaxserve.core.request import FinishReason, Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.prediction import LEARNED, make_predictor
from jaxserve.prediction import predictor as module
from jaxserve.prediction.base import LengthPredictor
from jaxserve.prediction.files import load_state
from jaxserve.prediction.learner import MIN_EXAMPLES
from jaxserve.prediction.predictor import FIRST_GUESS, PROBE_EVERY, LearnedPredictor
from jaxserve.runner.compile_counter import CompileCounter
from jaxserve.runner.program_cache import CompileWatch
from tests.prediction.made_up import HIDDEN, embed, finish, grow, hidden_state, make_request
from tests.waiting import eventually

MAX_TOKENS = 1000


@pytest.fixture
def new(features, compile_once, request):
    """Makes predictors without a thread, and closes them."""

    def make(name: str = "exact", path: Path | None = None, **options) -> LearnedPredictor:
        predictor = LearnedPredictor(
            name, features, MAX_TOKENS, path, compile_once, **{"background": False, **options}
        )
        request.addfinalizer(predictor.close)
        return predictor

    return make


def serve(
    predictor: LengthPredictor,
    count: int,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    probes: bool = True,
) -> list[tuple[float, list[tuple[int, float]], int]]:
    """Answer requests one by one; predictions, refined ones by position, and true lengths."""
    rng = np.random.default_rng(seed)
    seen = []
    for number in range(count):
        request, length = make_request(rng, max_tokens)
        first, refined = predictor.predict(request), []
        assert first is not None
        for position in range(1, min(length, max_tokens) if probes else 0, PROBE_EVERY):
            grow(request, position)
            hidden = hidden_state(length - position, rng)
            refined.append((position, predictor.refine([request], hidden)[0]))
        finish(request, length)
        predictor.finished(request)
        done = number % 8 == 7 or number == count - 1
        if done and isinstance(predictor, LearnedPredictor) and not predictor._thread.is_alive():
            predictor.catch_up()
        seen.append((first, refined, length))
    return seen


def error(pairs: list[tuple[float, float]]) -> float:
    return float(np.mean([abs(a - b) for a, b in pairs]))


@pytest.mark.parametrize("name", LEARNED)
def test_it_learns_from_what_it_serves(name: str, new) -> None:
    predictor = new(name)
    serve(predictor, 120)
    metrics = predictor.metrics()
    assert metrics.samples == 120 and metrics.kendall_tau > 0.25
    assert metrics.mae < 0.9 * metrics.mean_mae and 0 < metrics.bucket_accuracy <= 1
    seen = serve(predictor, 60, seed=1)
    lengths = [length for _, _, length in seen]
    of_mean = error([(float(np.mean(lengths)), length) for length in lengths])
    assert error([(first, length) for first, _, length in seen]) < 0.4 * of_mean


def test_hidden_states_improve_on_the_first_estimate(new) -> None:
    """Prompts say nothing here: only what is seen while decoding tells the lengths apart."""
    predictor = new("exact")
    predictor.features._embed = lambda ids: np.zeros((len(ids), HIDDEN), np.float32)
    try:
        serve(predictor, 100)
        seen = serve(predictor, 60, seed=1)
    finally:
        predictor.features._embed = embed
    late = [
        (f, r, length) for f, refined, length in seen for k, r in refined if k > 2 * PROBE_EVERY
    ]
    refined = error([(r, length) for _, r, length in late])
    assert refined < 0.5 * error([(first, length) for first, _, length in late])


def test_the_mean_until_enough_was_seen(new) -> None:
    predictor = new()
    lengths: list[int] = []
    for number in range(MIN_EXAMPLES):
        ((predicted, _, length),) = serve(predictor, 1, seed=number, probes=False)
        assert predicted == pytest.approx(np.mean(lengths) if lengths else FIRST_GUESS)
        lengths.append(length)
    predictions = {first for first, _, _ in serve(predictor, 20, seed=99, probes=False)}
    assert len(predictions) > 5  # now prompts differ


@pytest.mark.parametrize("name", LEARNED)
def test_estimates_are_within_what_is_possible(name: str, new) -> None:
    predictor = new(name)
    for count, max_tokens in ((5, 40), (40, 40), (10, 1), (15, MAX_TOKENS)):
        for first, refined, _ in serve(predictor, count, max_tokens=max_tokens):
            assert 1 <= first <= max_tokens
            for position, estimate in refined:
                assert min(position + 1, max_tokens) <= estimate <= max_tokens
    assert predictor.metrics().samples == 70


def test_tokens_on_their_way_count(new) -> None:
    predictor = new()
    request, _ = make_request(np.random.default_rng(0))
    predictor.predict(request)
    grow(request, 700)
    request.num_tokens += 200  # launched, not yet collected
    (estimate,) = predictor.refine([request], np.zeros((1, HIDDEN), np.float32))
    assert 901 <= estimate <= MAX_TOKENS


def test_several_requests_are_refined_as_each_alone(new) -> None:
    rng = np.random.default_rng(0)
    together, alone = new("range"), new("range")
    for predictor in (together, alone):
        serve(predictor, 40)
    requests = [make_request(rng)[0] for _ in range(3)]
    hidden = np.concatenate([hidden_state(n, rng) for n in (3, 50, 400)])
    for request, length in zip(requests, (1, 9, 9), strict=True):
        grow(request, length)
        assert together.predict(request) == alone.predict(request)
    singly = [alone.refine([r], hidden[[i]])[0] for i, r in enumerate(requests)]
    assert together.refine(requests, hidden) == pytest.approx(singly, rel=1e-4)
    assert len(set(singly)) == 3


def test_cut_off_answers_teach_lower_bounds(new) -> None:
    predictor = new()
    serve(predictor, 120, max_tokens=50, probes=False)
    rng = np.random.default_rng(7)
    long = [predictor.predict(r) for r, n in (make_request(rng) for _ in range(50)) if n > 80]
    assert np.median(long) > 42  # a regression on what was answered would end below 50


@pytest.mark.parametrize(
    ("reason", "length"),
    [(FinishReason.ABORT, 5), (FinishReason.SHED, 0), (FinishReason.STOP, 0)],
)
def test_some_ends_teach_nothing(reason: FinishReason, length: int, new) -> None:
    predictor = new()
    request, _ = make_request(np.random.default_rng(0))
    predictor.predict(request)
    finish(request, length, reason)
    predictor.finished(request)
    predictor.finished(request)  # nor do they come twice
    predictor.catch_up()
    assert predictor.metrics().samples == 0 and not predictor._open
    assert predictor._prompts.window.seen == 0


def test_a_request_that_ignores_eos_is_as_long_as_it_says(new) -> None:
    predictor = new()
    for stop, expected in (((), 700), (("x",), FIRST_GUESS)):  # a stop string may come early
        params = SamplingParams(ignore_eos=True, stop=stop)
        request = Request(request_id="r", prompt_token_ids=[1], params=params, max_tokens=700)
        assert predictor.predict(request) == expected
        grow(request, 30)
        (estimate,) = predictor.refine([request], np.zeros((1, HIDDEN), np.float32))
        assert (estimate == 700) == (not stop)
        finish(request, 700)
        predictor.finished(request)
        assert predictor.metrics().samples == len(stop)


def test_memory_of_open_requests_is_bounded(new, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OPEN", 10)
    predictor = new()
    rng = np.random.default_rng(0)
    requests = [make_request(rng)[0] for _ in range(25)]
    for request in requests:
        predictor.predict(request)
    assert len(predictor._open) == 10
    for request in requests:  # those forgotten are no error
        finish(request, 5)
        predictor.finished(request)
    predictor.catch_up()
    assert predictor._prompts.window.seen == 10


def test_the_newest_and_the_oldest_probes_of_a_long_answer_are_kept_alike(new) -> None:
    predictor = new()
    request, _ = make_request(np.random.default_rng(0))
    predictor.predict(request)
    for position in range(1, 900, PROBE_EVERY):
        grow(request, position)
        predictor.refine([request], np.ones((1, HIDDEN), np.float32))
    kept = predictor._open[request.key].probes
    assert len(kept) == module.PROBES_KEPT
    assert max(position for _, position in kept) > 300


# Threads and compiles.


def test_training_in_the_background_compiles_nothing(new, monkeypatch) -> None:
    monkeypatch.setattr(module, "DUTY", 1.0)
    predictor = new("rank", background=True)
    counter = CompileCounter()
    watch = CompileWatch(counter)
    counter.ready()
    serve(predictor, 60)
    learners = (predictor._prompts, predictor._probes)
    eventually(lambda: all(learner.model is not None for learner in learners), seconds=60)
    predictor.close()
    predictor.close()
    watch.close()
    assert counter.after_ready == 0
    assert not predictor._thread.is_alive()
    with pytest.raises(RuntimeError, match="background"):
        busy = new("exact", background=True)
        busy.catch_up()


def test_training_rests_most_of_the_time(new, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest after a slice is what the duty cycle leaves of the time it took."""
    predictor = new("exact")
    serve(predictor, MIN_EXAMPLES, probes=False)
    clock = iter(np.arange(0, 10_000, 2.0))  # every slice takes two seconds
    rests: list[float] = []

    class Closing(threading.Event):
        def wait(self, timeout=None) -> bool:
            assert timeout is not None
            rests.append(timeout)
            self.set()
            return True

    predictor._closing = Closing()
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    predictor._prompts.owe(100)
    request, length = make_request(np.random.default_rng(0))
    predictor.predict(request)
    finish(request, length)
    predictor.finished(request)
    predictor._run()
    assert rests == [pytest.approx(2 / module.DUTY - 2)]


def test_a_failure_in_training_is_told_and_serves_on(new, monkeypatch, caplog) -> None:
    predictor = new("exact", background=True)

    def fail(*args) -> None:
        raise FloatingPointError("made up")

    monkeypatch.setattr(predictor._prompts, "add", fail)
    serve(predictor, 1)
    eventually(lambda: not predictor._thread.is_alive(), seconds=60)
    assert "stopped learning" in caplog.text
    for _ in range(3):
        request, length = make_request(np.random.default_rng(0))
        assert predictor.predict(request) == FIRST_GUESS
        finish(request, length)
        predictor.finished(request)
    assert predictor._finished.empty() and predictor.metrics().samples == 4


# Files.


def test_what_was_learned_outlives_a_restart(new, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.npz"
    first = new("range", path)
    serve(first, 60)
    first.close()
    second = new("range", path)
    rng = np.random.default_rng(5)
    requests = [make_request(rng)[0] for _ in range(20)]
    assert [second.predict(r) for r in requests] == pytest.approx(
        [first.predict(r) for r in requests]
    )
    for request in requests:
        grow(request, 9)
    hidden = np.concatenate([hidden_state(30, rng) for _ in requests])
    assert second.refine(requests, hidden) == pytest.approx(first.refine(requests, hidden))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped", "other shapes", "pickled"])
def test_a_corrupt_file_is_one_warning(
    damage: str, new, features, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state.npz"
    first = new("exact", path)
    serve(first, 40, probes=False)
    first.close()
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-100])
    elif damage == "garbage":
        path.write_bytes(b"nothing of the kind")
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "other shapes":
        np.savez(path, **{"prompts.lengths": np.ones(3)})  # type: ignore[arg-type]
    else:
        np.savez(path, variance=np.array([{}], dtype=object))  # type: ignore[arg-type]
    predictor = new("exact", path)
    assert len(caplog.records) == 1 and "ignoring" in caplog.text
    request, _ = make_request(np.random.default_rng(0))
    assert predictor.predict(request) == FIRST_GUESS
    serve(predictor, 40, probes=False)  # learns anew
    assert predictor.metrics().samples == 40


BAD = st.one_of(
    st.sampled_from([-1.0, 0.0, 1e-300, 0.5, 1e38, math.inf, -math.inf, math.nan, 10.0**300]),
    st.sampled_from(["text", 1j, 2**63 - 1, -(2**63), True]),
    hnp.arrays(st.sampled_from([np.float64, np.int8, np.float16]), hnp.array_shapes()),
)


class Kept(dict[str, dict[str, np.ndarray]]):
    """What each kind of predictor keeps, by its name."""

    def __repr__(self) -> str:
        return "..."  # Hypothesis shows the arguments of an example that fails


@pytest.fixture(scope="module")
def learned(features, compile_once, tmp_path_factory) -> Kept:
    """What each kind of predictor keeps."""
    kept = Kept()
    for name in LEARNED:
        path = tmp_path_factory.mktemp("learned") / "state.npz"
        predictor = LearnedPredictor(
            name, features, MAX_TOKENS, path, compile_once, background=False
        )
        serve(predictor, 40)
        predictor.close()
        arrays = load_state(path)
        assert arrays is not None
        kept[name] = arrays
    return kept


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(LEARNED), st.integers(0, 99), BAD, st.booleans(), st.sampled_from([..., 0]))
def test_bad_numbers_are_ignored(
    new, learned, tmp_path: Path, caplog, name: str, number: int, bad: Any, whole: bool, at: Any
) -> None:
    """Whatever stands in a file, estimates are numbers between one and the limit."""
    arrays = dict(learned[name])
    key = sorted(arrays)[number % len(arrays)]
    if whole or isinstance(bad, np.ndarray):
        arrays[key] = np.asarray(bad)
    else:  # one number, or all of them, of the right shape
        arrays[key] = np.array(arrays[key], type(bad) if isinstance(bad, str) else None)
        fits = np.can_cast(np.asarray(bad).dtype, arrays[key].dtype, "same_kind")
        with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite
            arrays[key][at if arrays[key].ndim else ...] = bad if fits else 0
    caplog.clear()
    path = tmp_path / "state.npz"
    np.savez(path, **arrays)
    predictor = new(name, path)
    assert len(caplog.records) == (predictor._prompts.window.seen == 0)
    for first, refined, _ in serve(predictor, 3):
        assert all(1 <= length <= MAX_TOKENS for length in (first, *(r for _, r in refined)))
    predictor._path = None


def test_a_file_of_packed_zeros_is_not_read(new, tmp_path: Path, caplog, monkeypatch) -> None:
    monkeypatch.setattr("jaxserve.prediction.files.MAX_BYTES", 10_000)
    np.savez_compressed(tmp_path / "state.npz", variance=np.zeros(2000))
    new("exact", tmp_path / "state.npz")
    assert "larger than 10000 bytes" in caplog.text


def test_a_directory_that_cannot_be_written_is_a_warning(new, tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    predictor = new("exact", tmp_path / "file" / "state.npz")
    serve(predictor, 1)
    predictor.close()
    assert "could not keep" in caplog.text


def test_each_model_and_kind_has_a_file_of_its_own(tmp_path: Path, compile_once) -> None:
    for name, fingerprint in (("exact", "a"), ("exact", "b"), ("range", "a"), ("exact", "a")):
        predictor = make_predictor(
            name, embed=embed, hidden_size=HIDDEN, max_tokens=MAX_TOKENS, directory=tmp_path,
            fingerprint=fingerprint, compile=compile_once,
        )  # fmt: skip
        assert predictor.name == name and predictor.probe_every > 0
        predictor.close()
    assert len(list(tmp_path.iterdir())) == 3


def test_names_and_what_they_need() -> None:
    assert make_predictor("none").name == "none" and make_predictor("oracle").name == "oracle"
    with pytest.raises(ConfigError, match="crystal"):
        make_predictor("crystal")
    with pytest.raises(ConfigError, match="embeddings"):
        make_predictor("exact", hidden_size=4, max_tokens=10)
