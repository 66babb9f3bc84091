"""A small network: trained by JAX and Optax on a CPU, applied by numpy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding
from jax.stages import Compiled, Lowered

from jaxserve.prediction.losses import Labels, Loss

HIDDEN_UNITS = 64
BATCH = 32
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1  # with DROPOUT: a few hundred examples, a thousand features
DROPOUT = 0.3  # of features
CLIP = 5.0  # standardised features beyond this say no more

Compile = Callable[[str, Callable[[], Lowered]], Compiled]


class Weights(NamedTuple):
    """One hidden layer with ReLU.

    Attributes:
        first: float32 [features, HIDDEN_UNITS].
        first_bias: float32 [HIDDEN_UNITS].
        second: float32 [HIDDEN_UNITS, outputs].
        second_bias: float32 [outputs].
    """

    first: Any
    first_bias: Any
    second: Any
    second_bias: Any


class Scale(NamedTuple):
    """Mean and standard deviation of every feature: float32 [features] each."""

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Scale":
        """The scale of examples [examples, features]; what hardly varies is not blown up."""
        rows = features.astype(np.float32)
        deviation = rows.std(axis=0)
        return cls(rows.mean(axis=0), np.maximum(deviation, 0.1 * deviation.mean() + 1e-6))

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Standardised features, float32 [rows, features]."""
        return np.clip((features - self.mean) / self.deviation, -CLIP, CLIP)


def initial_weights(num_features: int, num_outputs: int, seed: int) -> Weights:
    """Random first layer, and a second that gives zero."""
    random = np.random.default_rng(seed).standard_normal
    first = random((num_features, HIDDEN_UNITS), np.float32) * num_features**-0.5
    return Weights(
        first,
        np.zeros(HIDDEN_UNITS, np.float32),
        np.zeros((HIDDEN_UNITS, num_outputs), np.float32),
        np.zeros(num_outputs, np.float32),
    )


def apply_weights(weights: Weights, features: np.ndarray) -> np.ndarray:
    """float32 [rows, outputs] of standardised features; plain numpy, for the engine's thread."""
    units = np.maximum(features @ weights.first + weights.first_bias, 0)
    return units @ weights.second + weights.second_bias


def rescale(weights: Weights, old: Scale, new: Scale) -> Weights:
    """Weights that make of newly scaled features what the old ones did, but for clipping."""
    shift = ((new.mean - old.mean) / old.deviation) @ weights.first
    first = weights.first * (new.deviation / old.deviation)[:, None]
    return weights._replace(first=first, first_bias=weights.first_bias + shift)


class TrainingStep:
    """One Adam step on a minibatch, compiled when it is made and never again.

    It runs on a CPU, so that it takes nothing from an accelerator that serves; without a CPU
    backend (`JAX_PLATFORMS`) it must share the first device.

    Args:
        name: of the program; the shapes are added.
        loss: what is minimised.
        num_features, num_outputs: shapes of the network.
        compile: compiles a program of some name, or fetches it from where programs are kept.
    """

    def __init__(
        self, name: str, loss: Loss, num_features: int, num_outputs: int, compile: Compile
    ) -> None:
        decayed = Weights(first=True, first_bias=False, second=True, second_bias=False)
        self._optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY, mask=decayed)
        self._loss = loss
        device = training_device()
        place = SingleDeviceSharding(device)

        def abstract(tree: Any) -> Any:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
            )

        weights = abstract(initial_weights(num_features, num_outputs, 0))
        labels = Labels(
            np.empty(BATCH, np.float32), np.empty(BATCH, np.int32), np.empty(BATCH, np.bool_)
        )
        self._state = abstract(jax.eval_shape(self._optimizer.init, weights))
        features = np.empty((BATCH, num_features), np.float32)
        args = (weights, self._state, *abstract((np.uint32(0), features, labels)))

        def lower() -> Lowered:
            with jax.default_device(device):
                return jax.jit(self._step).lower(*args)

        self._compiled = compile(f"{name}-{num_features}x{num_outputs}", lower)

    def initial_state(self) -> Any:
        """Adam's state before the first step: zeros, made without a program."""
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._state)

    def __call__(
        self, weights: Weights, state: Any, seed: int, features: np.ndarray, labels: Labels
    ) -> tuple[Weights, Any]:
        """Weights and Adam's state after one more step.

        Args:
            weights, state: what the last step gave, or initial ones.
            seed: of the dropout.
            features: standardised, float32 [BATCH, features].
            labels: numpy arrays of their lengths.
        """
        return self._compiled(weights, state, np.uint32(seed), features, labels)

    def _step(
        self, weights: Weights, state: Any, seed: jax.Array, features: jax.Array, labels: Labels
    ) -> tuple[Weights, Any]:
        keep = jax.random.bernoulli(jax.random.key(seed), 1 - DROPOUT, features.shape)
        features = jnp.where(keep, features / (1 - DROPOUT), 0)

        def loss(weights: Weights) -> jax.Array:
            units = jax.nn.relu(features @ weights.first + weights.first_bias)
            return self._loss(units @ weights.second + weights.second_bias, labels)

        updates, state = self._optimizer.update(jax.grad(loss)(weights), state, weights)
        updated: Any = optax.apply_updates(weights, updates)
        return updated, state


def training_device() -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]
    """A CPU, if JAX has one here."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
