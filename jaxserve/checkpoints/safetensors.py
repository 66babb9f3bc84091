"""Hugging Face checkpoint directories: config.json, *.safetensors, tokenizer files."""

import dataclasses
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve.checkpoints.base import Checkpoint
from jaxserve.checkpoints.quantised.hf_config import Quantisation, read_quantisation
from jaxserve.checkpoints.quantised.hf_weights import HfWeights
from jaxserve.checkpoints.quantised.rows import map_rows
from jaxserve.checkpoints.tensors import check_tensors, widened
from jaxserve.core.errors import CheckpointError
from jaxserve.core.sampling_defaults import SamplingDefaults, from_generation_config
from jaxserve.files.safetensors_file import map_tensors
from jaxserve.models.config import ModelConfig
from jaxserve.models.config_hf import from_hf_config
from jaxserve.models.parameters import HF_EMBEDDING, HF_HEAD, HF_PREFIX, Piece
from jaxserve.models.weights import dense
from pallas_kernels.weights import Format, Quantised

GENERATION_CONFIG = "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Vision parts of Gemma 3, and buffers that old files carry along.
IGNORED_PARTS = ("vision_tower.", "multi_modal_projector.", "rotary_emb.inv_freq")
TYPES = ("float64", "float32", "float16", "bfloat16")
QUANTISATION = "quantization_config"
COMPARED_ROWS = 4096  # of an embedding at a time

log = logging.getLogger(__name__)


class SafetensorsCheckpoint(Checkpoint):
    """A Hugging Face model directory, weights in one file or several with an index.

    Where a configuration says that the embeddings are tied, and another output projection is
    stored beside them, that one is used, as transformers does.

    Weights that a `quantization_config` describes are read in the formats of `pallas_kernels`.

    Args:
        path: the directory.
        allow_unknown: go on with keys of config.json that are not known.

    Raises:
        CheckpointError: a file is missing or corrupt, or tensors do not fit the configuration.
        ConfigError: the architecture is not supported.
    """

    def __init__(self, path: Path, *, allow_unknown: bool = False) -> None:
        self._path = Path(path)
        values, where = read_json(self._path / "config.json"), "config.json"
        generation: dict[str, Any] | None = None
        if (self._path / GENERATION_CONFIG).exists():
            generation, where = read_json(self._path / GENERATION_CONFIG), GENERATION_CONFIG
        quantisation = self._quantisation(values, allow_unknown)
        config = from_hf_config(
            {key: value for key, value in values.items() if key != QUANTISATION},
            name=self._path.name,
            generation_config=generation,
            allow_unknown=allow_unknown,
        )
        # Old checkpoints have them in config.json, where a generation_config.json is missing.
        self._sampling = from_generation_config(
            values if generation is None else generation, str(self._path / where)
        )
        self._weights = HfWeights(_tensors(self._path), quantisation)
        shapes = self._weights.shapes
        embedding = next((n for n in shapes if n.endswith(HF_EMBEDDING)), None)
        if embedding is None:
            raise CheckpointError(f"{self._path}: tensor {HF_EMBEDDING} is missing")
        lm_head = next((n for n in shapes if n.endswith(HF_HEAD)), HF_HEAD)
        if config.tie_embeddings and lm_head in shapes and not self._equal(embedding, lm_head):
            log.warning(
                "%s: config.json ties the embeddings, but %s is stored and differs: it is used",
                self._path, lm_head,
            )  # fmt: skip
            config = dataclasses.replace(config, tie_embeddings=False)
        self._config = config
        prefix = embedding.removesuffix(HF_EMBEDDING)
        self._pieces = {
            name: [_named_as_here(piece, prefix, lm_head) for piece in parameter.sources["hf"]]
            for name, parameter in self.parameters.items()
        }
        pieces = [*itertools.chain(*self._pieces.values())]

        def ignored(name: str) -> bool:
            tied_head = config.tie_embeddings and name == lm_head
            return tied_head or any(part in name for part in IGNORED_PARTS)

        check_tensors(pieces, shapes, ignored, self._path)
        for name in (piece.tensor for piece in pieces):
            kind = self._weights.type(name)
            if kind is not None and kind.name not in TYPES:
                raise CheckpointError(
                    f"{self._path}: tensor {name} has type {kind.name}; supported: "
                    f"{', '.join(TYPES)} (others only by a {QUANTISATION})"
                )

    @property
    def config(self) -> ModelConfig:
        """The model's architecture, from config.json and generation_config.json."""
        return self._config

    @property
    def tokenizer_path(self) -> Path:
        """The directory itself."""
        return self._path

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        """Those of generation_config.json."""
        return self._sampling

    def read(self, name: str) -> np.ndarray:
        """Read one parameter, in float32 or, where it is stored so, bfloat16."""
        parts = [dense(part) for part in self.read_parts(name)]
        return self.parameters[name].join(parts)

    def formats(self, name: str) -> tuple[Format | None, ...]:
        """How each part is quantised in the files; None where it is not, or has another order."""
        return tuple(self._weights.format(piece.tensor) for piece in self._of(name))

    def read_parts(self, name: str) -> list[np.ndarray | Quantised]:
        """One parameter's parts, in the files' own numbers."""
        return [self._read_part(piece) for piece in self._of(name)]

    def _read_part(self, piece: Piece) -> np.ndarray | Quantised:
        found = self._weights.read(piece.tensor)
        if not isinstance(found, Quantised):
            found = widened(piece.tensor, found)
        return map_rows(piece.arrange, found)

    def _of(self, name: str) -> list[Piece]:
        if name not in self._pieces:
            raise CheckpointError(f"{self._path}: there is no parameter {name}")
        return self._pieces[name]

    def _quantisation(self, values: dict[str, Any], allow_unknown: bool) -> Quantisation:
        found = values.get(QUANTISATION)
        if not found:
            return Quantisation("none", ())
        if not isinstance(found, dict):
            raise CheckpointError(f"{self._path}: {QUANTISATION} is not an object")
        return read_quantisation(found, allow_unknown=allow_unknown)

    def _equal(self, first: str, second: str) -> bool:
        """Whether two matrices are the same, read a part at a time."""
        shapes, read = self._weights.shapes, self._weights.read
        if shapes[first] != shapes[second] or len(shapes[first]) != 2:
            return False
        parts = (slice(i, i + COMPARED_ROWS) for i in range(0, shapes[first][0], COMPARED_ROWS))
        return all(_same_bytes(read(first, part), read(second, part)) for part in parts)


def _same_bytes(first: np.ndarray | Quantised, second: np.ndarray | Quantised) -> bool:
    one, other = jax.tree.leaves(first), jax.tree.leaves(second)
    return [(x.dtype, x.tobytes()) for x in one] == [(x.dtype, x.tobytes()) for x in other]


def _named_as_here(piece: Piece, prefix: str, lm_head: str) -> Piece:
    """A declared piece under the name that a file has for its tensor.

    Args:
        piece: as its family declares it.
        prefix: what stands in the place of `HF_PREFIX`.
        lm_head: the name of the output projection.
    """
    name = lm_head if piece.tensor == HF_HEAD else prefix + piece.tensor.removeprefix(HF_PREFIX)
    return dataclasses.replace(piece, tensor=name)


def _tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a directory by name, none read yet, looked for as transformers does.

    Other files may lie beside them: adapters, the same weights under other names, other parts.
    """
    if (path / SINGLE).exists():
        return map_tensors(path / SINGLE)
    if (path / INDEX).exists():
        return _indexed_tensors(path)
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "no *.safetensors"
        raise CheckpointError(f"{path} has neither {SINGLE} nor {INDEX}; it has {found}")
    return map_tensors(files[0])


def _indexed_tensors(path: Path) -> dict[str, np.ndarray]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX} has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(f"{path / INDEX} names {file!r}, which is no file beside it")
    files = {file: map_tensors(path / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in files[file]:
            raise CheckpointError(f"{path / file} has no tensor {name}")
    return {name: files[file][name] for name, file in weight_map.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return data
