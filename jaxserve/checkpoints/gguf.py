"""Checkpoints in one GGUF file, whole or split (llama.cpp's format)."""

from pathlib import Path

import numpy as np

from jaxserve.checkpoints.base import Checkpoint
from jaxserve.checkpoints.gguf_file import GgufFile
from jaxserve.checkpoints.pull import demo_sampling
from jaxserve.checkpoints.tensors import check_tensors, combine_source
from jaxserve.core.errors import CheckpointError
from jaxserve.core.sampling_defaults import SamplingDefaults, from_gguf_metadata
from jaxserve.models.config import ModelConfig
from jaxserve.models.config_gguf import from_gguf
from jaxserve.models.parameters import GGUF_EMBEDDING, GGUF_HEAD
from jaxserve.models.registry import parameters_of

ROPE_FACTORS = "rope_freqs.weight"


class GgufCheckpoint(Checkpoint):
    """A GGUF file with any quantisation that the `gguf` package can undo.

    Args:
        path: the file, or any part of a split one.
        allow_unknown: go on with metadata keys of the architecture that are not known.

    Raises:
        CheckpointError: the file is corrupt, or its tensors do not fit its metadata.
        ConfigError: the architecture is not supported.
    """

    def __init__(self, path: Path, *, allow_unknown: bool = False) -> None:
        self._file = GgufFile(path)
        kind = self._file.metadata.get("general.type", "model")
        if kind != "model":
            raise CheckpointError(f"{path} holds no model, but is of type {kind!r}")
        tensors = self._file.tensors
        if GGUF_EMBEDDING not in tensors:
            raise CheckpointError(f"{path}: tensor {GGUF_EMBEDDING} is missing")
        factors = self._file.read(ROPE_FACTORS).ravel() if ROPE_FACTORS in tensors else None
        self._config = from_gguf(
            self._file.metadata,
            vocab_size=tensors[GGUF_EMBEDDING].shape[0],
            tie_embeddings=GGUF_HEAD not in tensors,
            rope_factors=None if factors is None else factors.tolist(),
            allow_unknown=allow_unknown,
        )
        self._sources = {
            name: parameter.sources["gguf"]
            for name, parameter in parameters_of(self._config).items()
        }
        shapes = {name: info.shape for name, info in tensors.items()}
        check_tensors(self._sources.values(), shapes, lambda name: name == ROPE_FACTORS, path)

    @property
    def config(self) -> ModelConfig:
        """The model's architecture, from the file's metadata."""
        return self._config

    @property
    def names(self) -> frozenset[str]:
        """Names of all parameters."""
        return frozenset(self._sources)

    @property
    def tokenizer_path(self) -> Path:
        """The file itself: its metadata holds the vocabulary."""
        return self._file.path

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        """Those in its metadata, and of a demo model those of its model card."""
        path = self._file.path
        return {**demo_sampling(path), **from_gguf_metadata(self._file.metadata, str(path))}

    def read(self, name: str) -> np.ndarray:
        """Dequantise one parameter to float32."""
        if name not in self._sources:
            raise CheckpointError(f"{self._file.path}: there is no parameter {name}")
        source = self._sources[name]
        return combine_source(source, {t: self._file.read(t) for t in source.tensors})
