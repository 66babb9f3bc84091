"""Checkpoints in one GGUF file, whole or split (llama.cpp's format)."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np

from jaxserve.checkpoints.base import Checkpoint
from jaxserve.checkpoints.gguf_file import GgufFile
from jaxserve.checkpoints.pull import demo_sampling
from jaxserve.checkpoints.quantised.rows import on_outputs
from jaxserve.checkpoints.tensors import check_tensors
from jaxserve.core.errors import CheckpointError
from jaxserve.core.sampling_defaults import SamplingDefaults, from_gguf_metadata
from jaxserve.models.config import ModelConfig
from jaxserve.models.config_gguf import from_gguf
from jaxserve.models.parameters import GGUF_EMBEDDING, GGUF_HEAD, Piece
from pallas_kernels.weights import Format, Quantised

# Divisors of rotary frequencies: for every context, or for long ones; and for short ones.
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight")
SHORT_FACTORS = "rope_factors_short.weight"


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
        self._config = from_gguf(
            self._file.metadata,
            vocab_size=tensors[GGUF_EMBEDDING].shape[0],
            tie_embeddings=GGUF_HEAD not in tensors,
            rope_factors=self._rope_factors(),
            allow_unknown=allow_unknown,
        )
        scaling = self._config.rope_scaling
        if SHORT_FACTORS in tensors and scaling is not None:
            short = tuple(self._file.read(SHORT_FACTORS).ravel().tolist())
            scaling = dataclasses.replace(scaling, short_divisors=short)
            self._config = dataclasses.replace(self._config, rope_scaling=scaling)
        self._pieces = {name: one.sources["gguf"] for name, one in self.parameters.items()}
        shapes = {name: info.shape for name, info in tensors.items()}
        pieces = itertools.chain(*self._pieces.values())
        check_tensors(pieces, shapes, lambda name: name in {*ROPE_FACTORS, SHORT_FACTORS}, path)

    def _rope_factors(self) -> list[float] | None:
        """The divisors for as long a context as the model has; None if it has none."""
        for name in ROPE_FACTORS:
            if name in self._file.tensors:
                return self._file.read(name).ravel().tolist()
        return None

    @property
    def config(self) -> ModelConfig:
        """The model's architecture, from the file's metadata."""
        return self._config

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
        parts = [one.arrange(self._file.read(one.tensor)) for one in self._of(name)]
        return self.parameters[name].join(parts)

    def formats(self, name: str) -> tuple[Format | None, ...]:
        """How each part is quantised in the file; None where it is not, or in no known way."""
        return tuple(self._file.format(piece.tensor) for piece in self._of(name))

    def read_parts(self, name: str) -> list[np.ndarray | Quantised]:
        """One parameter's parts, in the file's own numbers."""
        return [self._read_part(piece) for piece in self._of(name)]

    def _read_part(self, piece: Piece) -> np.ndarray | Quantised:
        if self._file.format(piece.tensor) is None:
            return piece.arrange(self._file.read(piece.tensor))
        return on_outputs(piece.arrange, self._file.read_quantised(piece.tensor))

    def _of(self, name: str) -> tuple[Piece, ...]:
        if name not in self._pieces:
            raise CheckpointError(f"{self._file.path}: there is no parameter {name}")
        return self._pieces[name]
