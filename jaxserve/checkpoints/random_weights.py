"""Random weights in place of a checkpoint, for running an architecture without its files."""

import zlib
from pathlib import Path

import numpy as np

from jaxserve.checkpoints.base import Checkpoint
from jaxserve.core.errors import CheckpointError
from jaxserve.models.config import ModelConfig


class RandomCheckpoint(Checkpoint):
    """Weights of ordinary size: factors are 1, the rest normal with variance 1 / inputs.

    The same seed gives the same model on every mesh. Drawn on the host, one parameter at a
    time, so that no program is compiled for it.

    Args:
        config: the architecture.
        seed: of all parameters.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config = config
        self._seed = seed

    @property
    def config(self) -> ModelConfig:
        """The model's architecture."""
        return self._config

    @property
    def tokenizer_path(self) -> Path:
        """There is none.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError("random weights come without a tokenizer")

    def read(self, name: str) -> np.ndarray:
        """Draw one parameter, float32."""
        parameter = self.parameters[name]
        if parameter.kind == "factor":
            return np.ones(parameter.shape, np.float32)
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        scale = np.float32(parameter.shape[-1] ** -0.5)
        return rng.standard_normal(parameter.shape, np.float32) * scale
