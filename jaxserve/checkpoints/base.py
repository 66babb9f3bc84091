"""What every checkpoint format offers."""

import abc
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.core.sampling_defaults import SamplingDefaults
from jaxserve.models.config import ModelConfig
from jaxserve.models.parameters import Parameter
from jaxserve.models.registry import parameters_of
from pallas_kernels.weights import Format, Quantised

if TYPE_CHECKING:
    from jaxserve.models.weights import Weight

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
    def names(self) -> frozenset[str]:
        """Names of all parameters."""
        return frozenset(self.parameters)

    @functools.cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """The model's parameters by name, as its family declares them."""
        return parameters_of(self.config)

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

    def formats(self, name: str) -> tuple[Format | None, ...]:
        """How each part of a parameter is quantised in the file, None where it is not."""
        return (None,) * len(self.parameters[name].part_sizes or (1,))

    def read_parts(self, name: str) -> list[np.ndarray | Quantised]:
        """Read one parameter's parts, those that are quantised as they are.

        Raises:
            CheckpointError: as of `read`.
        """
        return [*self.parameters[name].split(self.read(name))]

    def restore(self, targets: "Mapping[str, Any]") -> "dict[str, Weight]":
        """Place those parameters that this format can read shard by shard from disk.

        `load_params` reads what is left out here by `read`. Every target has the shape of the
        stored parameter; how it is held, its dtype and sharding may be any.
        """
        del targets
        return {}
