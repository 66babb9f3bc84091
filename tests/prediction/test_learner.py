"""Learners on made-up examples: they learn, in all three ways, and go on after a restart."""

import numpy as np
import pytest

from jaxserve.prediction.base import kendall_tau
from jaxserve.prediction.bins import LengthBins
from jaxserve.prediction.learner import MIN_EXAMPLES, PUBLISH_STEPS, Learner, ReplayWindow
from jaxserve.prediction.losses import OBJECTIVES
from jaxserve.prediction.network import Scale, apply_weights, initial_weights, rescale

BINS = LengthBins(400)
WIDTH = 9


def examples(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((count, WIDTH)).astype(np.float32)
    noise = 0.1 * rng.standard_normal(count)
    lengths = np.clip(np.exp(3.5 + features[:, 0] - features[:, 1] + noise), 1, 400)
    return features, np.rint(lengths)


def make_learner(objective: str, compile, capacity: int = 512) -> Learner:
    return Learner(objective, f"test-{objective}", BINS, WIDTH, capacity, compile)


def teach(learner: Learner, count: int, seed: int = 0, limit: float = 1e9) -> None:
    for row, length in zip(*examples(count, seed), strict=True):
        learner.add(row, min(length, limit), bool(length > limit))
        learner.owe(4)
        learner.train(1000)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_learns_what_the_mean_does_not_know(objective: str, compile_once) -> None:
    learner = make_learner(objective, compile_once)
    teach(learner, 160)
    features, lengths = examples(200, seed=1)
    assert learner.model is not None
    predicted = learner.model.lengths(learner.model.outputs(features))
    assert kendall_tau(predicted, lengths) > 0.7
    assert np.abs(predicted - lengths).mean() < 0.6 * np.abs(lengths.mean() - lengths).mean()
    assert (predicted >= 1).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_lower_bounds_do_not_pass_for_lengths(objective: str, compile_once) -> None:
    """Answers cut off at 30 tokens: the longest are predicted to be at least that."""
    learner = make_learner(objective, compile_once)
    teach(learner, 160, limit=30)
    features, lengths = examples(200, seed=1)
    assert learner.model is not None
    predicted = learner.model.lengths(learner.model.outputs(features))
    assert np.median(predicted[lengths > 60]) > 26
    assert np.median(predicted[lengths < 20]) < 22


def test_no_model_before_there_are_examples_enough(compile_once) -> None:
    learner = make_learner("exact", compile_once)
    teach(learner, MIN_EXAMPLES - 1)
    assert learner.model is None and learner.owed == 0  # nothing can be done yet
    teach(learner, 1, seed=1)
    assert learner.model is not None


def test_a_published_model_never_changes(compile_once) -> None:
    learner = make_learner("range", compile_once)
    teach(learner, MIN_EXAMPLES)
    model, (features, _) = learner.model, examples(5, seed=2)
    assert model is not None
    before = model.outputs(features)
    teach(learner, 20, seed=3)
    assert learner.model is not model
    assert (model.outputs(features) == before).all()


def test_models_come_out_while_much_is_owed(compile_once) -> None:
    learner = make_learner("exact", compile_once)
    for row, length in zip(*examples(MIN_EXAMPLES, 0), strict=True):
        learner.add(row, length, False)
    learner.owe(10 * PUBLISH_STEPS)
    learner.train(PUBLISH_STEPS - 1)
    assert learner.model is None
    learner.train(1)
    assert learner.model is not None and learner.owed == 9 * PUBLISH_STEPS


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_going_on_after_a_restart(objective: str, compile_once) -> None:
    first, second = (make_learner(objective, compile_once, capacity=40) for _ in range(2))
    teach(first, 55)  # the ring has gone round
    second.restore(second.checked(first.arrays()))
    assert second.window.seen == 55
    assert (second.window.lengths == first.window.lengths).all()
    features, _ = examples(9, seed=2)
    assert first.model is not None and second.model is not None
    assert second.model.outputs(features) == pytest.approx(first.model.outputs(features))
    teach(second, 10, seed=3)  # and it can be trained


def test_what_does_not_fit_is_refused(compile_once) -> None:
    small = make_learner("exact", compile_once)
    teach(small, 40)
    good = small.arrays()
    bad = [
        {**good, "first": good["first"][:-1]},
        {**good, "second": np.full_like(good["second"], np.nan)},
        {**good, "lengths": good["lengths"][:-1]},
        {**good, "lengths": np.zeros_like(good["lengths"])},
        {**good, "features": good["features"][:, :-1]},
        {**good, "deviation": np.zeros_like(good["deviation"])},
        {**good, "second": np.full_like(good["second"], 1e38)},
        {**good, "seen": np.array(-1)},
        {**good, "lengths": good["lengths"].astype(str)},
        {name: array for name, array in good.items() if name != "deviation"},
    ]
    for arrays in bad:
        learner = make_learner("exact", compile_once)
        with pytest.raises((ValueError, KeyError)):
            learner.checked(arrays)
        assert learner.model is None and learner.window.seen == 0


def test_the_window_keeps_the_last_examples() -> None:
    window = ReplayWindow(3, 1)
    for value in range(1, 6):
        window.add(np.array([value]), value, value == 4)
    assert len(window) == 3 and window.seen == 5
    assert sorted(window.lengths.tolist()) == [3, 4, 5]
    assert window.features[:, 0].tolist() == window.lengths.tolist()
    assert window.censored.tolist() == [length == 4 for length in window.lengths]


def test_a_new_scale_changes_nothing_that_was_learned() -> None:
    rng = np.random.default_rng(0)
    weights = initial_weights(4, 2, seed=1)
    weights = weights._replace(second=rng.standard_normal(weights.second.shape))
    old = Scale.of(rng.standard_normal((50, 4)))
    new = Scale.of(3 + 2 * rng.standard_normal((50, 4)))
    features = 0.5 * rng.standard_normal((9, 4))  # far from what is clipped
    again = rescale(weights, old, new)
    assert apply_weights(again, new.apply(features)) == pytest.approx(
        apply_weights(weights, old.apply(features)), rel=1e-4, abs=1e-4
    )
