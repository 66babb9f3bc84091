"""Learns lengths from examples that come in one after the other."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jaxserve.prediction.bins import LengthBins
from jaxserve.prediction.isotonic import isotonic_fit
from jaxserve.prediction.losses import OBJECTIVES, Labels
from jaxserve.prediction.network import (
    BATCH,
    Compile,
    Scale,
    TrainingStep,
    Weights,
    apply_weights,
    initial_weights,
    rescale,
)

MIN_EXAMPLES = 32  # before them there is no model
PUBLISH_STEPS = 32  # a model is published after so many steps, or when no step is owed
MAX_OWED = 1024  # steps; a training thread that falls behind drops what is beyond
CALIBRATION_EXAMPLES = 512
# What is restored: numbers that arithmetic in float32 cannot carry off to infinity.
MAX_NUMBER, LEAST_DEVIATION, MAX_SEEN = 65504.0, 1e-7, 2**48


@dataclasses.dataclass(frozen=True)
class Model:
    """What was learned up to some moment; never changed, so it can be swapped in at once.

    Attributes:
        objective: `exact`, `range` or `rank`.
        bins: of the distributions that `range` gives.
        scale: of the features.
        weights: of the network.
        calibration: scores and the log lengths they stand for, both ascending; of `rank`.
    """

    objective: str
    bins: LengthBins
    scale: Scale
    weights: Weights
    calibration: tuple[np.ndarray, np.ndarray] | None = None

    def outputs(self, features: np.ndarray) -> np.ndarray:
        """What the network says about features [rows, features]: [rows, outputs]."""
        return apply_weights(self.weights, self.scale.apply(features))

    def shares(self, outputs: np.ndarray) -> np.ndarray:
        """The distributions over bins that the outputs of `range` mean: [rows, bins]."""
        powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def lengths(self, outputs: np.ndarray) -> np.ndarray:
        """The lengths that outputs mean, float64 [rows]: medians of `range`'s distributions."""
        if self.objective == "range":
            return self.bins.quantile(self.shares(outputs))
        logs = outputs[:, 0]
        if self.calibration is not None:
            logs = np.interp(logs, *self.calibration)
        return np.exp(np.clip(logs, 0, np.log(self.bins.edges[-1])))


class ReplayWindow:
    """The examples that came last, in a ring.

    Attributes:
        features: float16 [capacity, features].
        lengths: float32 [capacity].
        censored: bool [capacity], whether the true length is that or more.
        seen: examples added so far; the last min(seen, capacity) are here.
    """

    def __init__(self, capacity: int, num_features: int) -> None:
        self.features = np.zeros((capacity, num_features), np.float16)
        self.lengths = np.zeros(capacity, np.float32)
        self.censored = np.zeros(capacity, np.bool_)
        self.seen = 0

    def __len__(self) -> int:
        return min(self.seen, len(self.lengths))

    def add(self, features: np.ndarray, length: float, censored: bool) -> None:
        """Take in an example: features [features], and the length that came out."""
        at = self.seen % len(self.lengths)
        self.features[at], self.lengths[at], self.censored[at] = features, length, censored
        self.seen += 1


class Learner:
    """A replay window, and a model that is trained on it. Not thread-safe but for `model`.

    Args:
        objective: `exact`, `range` or `rank`.
        name: of the training program.
        bins: the bins of lengths.
        num_features: length of the feature vectors.
        capacity: examples in the window.
        compile: see `TrainingStep`.
        seed: of the initial weights, the minibatches and the dropout.

    Attributes:
        model: the one published last; None until there were `MIN_EXAMPLES`.
    """

    def __init__(
        self,
        objective: str,
        name: str,
        bins: LengthBins,
        num_features: int,
        capacity: int,
        compile: Compile,
        seed: int = 0,
    ) -> None:
        self.model: Model | None = None
        self._owed = 0
        self.window = ReplayWindow(capacity, num_features)
        self._objective = objective
        self._bins = bins
        self._random = np.random.default_rng(seed)
        loss = OBJECTIVES[objective]
        num_outputs = len(bins) if loss.per_bin else 1
        self._weights = initial_weights(num_features, num_outputs, seed)
        self._step = TrainingStep(name, loss.loss, num_features, num_outputs, compile)
        self._state: Any = self._step.initial_state()
        self._scale: Scale | None = None
        self._rescale_at = MIN_EXAMPLES
        self._unpublished = 0

    def add(self, features: np.ndarray, length: float, censored: bool) -> None:
        """Take in an example: features [features], and the length that came out."""
        self.window.add(features, length, censored)

    def owe(self, steps: int) -> None:
        """So many more steps are to be done."""
        self._owed = min(self._owed + steps, MAX_OWED)

    @property
    def owed(self) -> int:
        """Steps of training to be done; none before there are `MIN_EXAMPLES`."""
        return self._owed if len(self.window) >= MIN_EXAMPLES else 0

    def train(self, max_steps: int) -> None:
        """Do what is owed, at most so many steps, and publish now and then.

        Raises:
            FloatingPointError: it leads to nothing finite; the model stays as it was.
        """
        steps = min(self.owed, max_steps)
        if steps and self.window.seen >= self._rescale_at:
            self._measure()
        for _ in range(steps):
            self._train_once()
        self._owed -= steps
        self._unpublished += steps
        if self._unpublished >= PUBLISH_STEPS or (self._unpublished and not self.owed):
            self._publish()

    def _train_once(self) -> None:
        window, scale = self.window, self._scale
        assert scale is not None
        rows = self._random.integers(0, len(window), BATCH)
        lengths = window.lengths[rows]
        labels = Labels(np.log(lengths), self._bins.index(lengths), window.censored[rows])
        features = scale.apply(window.features[rows]).astype(np.float32)
        seed = int(self._random.integers(2**32))
        self._weights, self._state = self._step(self._weights, self._state, seed, features, labels)

    def _measure(self) -> None:
        """Take the features' scale anew: with twice the examples it is better known."""
        window = self.window
        new, old = Scale.of(window.features[: len(window)]), self._scale
        weights = Weights(*(np.asarray(w) for w in self._weights))
        if old is not None:
            weights = rescale(weights, old, new)
        elif self._objective == "exact":  # begin with the mean
            mean = np.log(window.lengths[: len(window)]).mean(keepdims=True)
            weights = weights._replace(second_bias=mean.astype(np.float32))
        self._weights, self._scale = weights, new
        self._rescale_at = 2 * window.seen

    def _publish(self) -> None:
        assert self._scale is not None
        self._unpublished = 0
        weights = Weights(*(np.array(w) for w in self._weights))
        if not all(np.isfinite(array).all() for array in weights):
            raise FloatingPointError("training came to weights that are not finite")
        model = Model(self._objective, self._bins, self._scale, weights)
        if self._objective == "rank":
            model = dataclasses.replace(model, calibration=self._calibrate(model))
        self.model = model

    def _calibrate(self, model: Model) -> tuple[np.ndarray, np.ndarray]:
        """What lengths the scores stand for, from the examples that came last."""
        window = self.window
        newest = np.arange(max(0, window.seen - CALIBRATION_EXAMPLES), window.seen)
        rows = newest[-len(window) :] % len(window.lengths)
        scores = model.outputs(window.features[rows])[:, 0]
        return isotonic_fit(scores, np.log(window.lengths[rows]))

    # -- over a restart -------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """All that was learned, but for Adam's moments: small arrays by name."""
        window, count = self.window, len(self.window)
        found = {
            "features": window.features[:count],
            "lengths": window.lengths[:count],
            "censored": window.censored[:count],
            "seen": np.array(window.seen, np.int64),
        }
        if self._scale is not None:
            named = {**self._scale._asdict(), **self._weights._asdict()}
            found |= {name: np.asarray(value) for name, value in named.items()}
        return found

    def checked(self, arrays: dict[str, np.ndarray]) -> "Learned":
        """What `arrays` had, fit to be gone on with by `restore`.

        Raises:
            ValueError, KeyError: they are not from a learner of the same shapes, or have numbers
                that no learner can have come to.
        """
        window = self.window
        seen = _numbers("seen", arrays["seen"], (), 0, MAX_SEEN)
        count = min(int(seen), len(window.lengths))
        shape = (count, *window.features.shape[1:])
        learned = Learned(
            int(seen),
            _numbers("features", arrays["features"], shape, -MAX_NUMBER, MAX_NUMBER),
            _numbers("lengths", arrays["lengths"], (count,), 1, MAX_NUMBER),
            _numbers("censored", arrays["censored"], (count,), 0, 1).astype(np.bool_),
        )
        if "mean" not in arrays:
            return learned
        of_feature = window.features.shape[1:]
        scale = Scale(
            _numbers("mean", arrays["mean"], of_feature, -MAX_NUMBER, MAX_NUMBER),
            _numbers("deviation", arrays["deviation"], of_feature, LEAST_DEVIATION, MAX_NUMBER),
        )
        weights = Weights(*(
            _numbers(name, arrays[name], np.shape(own), -MAX_NUMBER, MAX_NUMBER)
            for name, own in zip(Weights._fields, self._weights, strict=True)
        ))  # fmt: skip
        return learned._replace(scale=scale, weights=weights)

    def restore(self, learned: "Learned") -> None:
        """Go on from what was `checked`."""
        window, count = self.window, len(learned.lengths)
        window.features[:count] = learned.features
        window.lengths[:count] = learned.lengths
        window.censored[:count] = learned.censored
        window.seen = learned.seen
        if learned.scale is not None and learned.weights is not None:
            self._scale, self._weights = learned.scale, learned.weights
            self._rescale_at = 2 * learned.seen
            self._publish()


class Learned(NamedTuple):
    """What a learner knew; see its attributes."""

    seen: int
    features: np.ndarray
    lengths: np.ndarray
    censored: np.ndarray
    scale: Scale | None = None
    weights: Weights | None = None


def _numbers(
    name: str, found: np.ndarray, shape: tuple[int, ...], low: float, high: float
) -> np.ndarray:
    """An array as float32, or float64 if it has no axes.

    Raises:
        ValueError: another shape, no numbers, or some that are not in [low, high].
    """
    if found.shape != shape or found.dtype.kind not in "biuf":
        raise ValueError(f"{name} is {found.dtype}{list(found.shape)}, not {list(shape)}")
    numbers = found.astype(np.float32 if shape else np.float64)
    if not ((numbers >= low) & (numbers <= high)).all():  # NaN is not, either
        raise ValueError(f"{name} has numbers that are not in [{low:g}, {high:g}]")
    return numbers
