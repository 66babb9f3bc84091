"""What every checkpoint format offers."""

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxserve.core.sampling_defaults import SamplingDefaults
from jaxserve.models.config import ModelConfig

if TYPE_CHECKING:
    import jax

MARKER = "jaxserve.json"  # the file that only a directory from `jaxserve convert` has


class Checkpoint(abc.ABC):
    """A model on disk: its configuration, its parameters by name, and its tokenizer.

    Opening reads headers only; parameters are read one at a time, when asked for.
    """

    @property
    @abc.abstractmethod
    def config(self) -> ModelConfig:
        """The model's architecture."""

    @property
    @abc.abstractmethod
    def names(self) -> frozenset[str]:
        """Names of all parameters, as the model's family declares them."""

    @property
    @abc.abstractmethod
    def tokenizer_path(self) -> Path:
        """File or directory that `jaxserve.tokenizers.load_tokenizer` takes."""

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        """What its authors advise for requests that do not say how to sample."""
        return {}

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """Read one parameter: float32, or bfloat16 (ml_dtypes) where it is stored so.

        Raises:
            CheckpointError: there is no such parameter, or its bytes cannot be read.
        """

    def restore(self, targets: "Mapping[str, jax.ShapeDtypeStruct]") -> "dict[str, jax.Array]":
        """Place those parameters that this format can read shard by shard from disk.

        `load_params` reads what is left out here by `read`. Every target has the shape of the
        stored parameter; its dtype and sharding may be any.
        """
        del targets
        return {}
