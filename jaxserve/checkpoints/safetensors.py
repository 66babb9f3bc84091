"""Hugging Face checkpoint directories: config.json, *.safetensors, tokenizer files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxserve.checkpoints.base import Checkpoint, combine_source
from jaxserve.checkpoints.names import Shape, check_tensors, hf_sources
from jaxserve.core.errors import CheckpointError
from jaxserve.models.config import ModelConfig
from jaxserve.models.config_readers import from_hf_config

INDEX = "model.safetensors.index.json"
EMBEDDING = "embed_tokens.weight"
# Vision parts of Gemma 3, and buffers that old files carry along.
IGNORED_PARTS = ("vision_tower.", "multi_modal_projector.", "rotary_emb.inv_freq")


class SafetensorsCheckpoint(Checkpoint):
    """A Hugging Face model directory, weights in one file or several with an index.

    Raises:
        CheckpointError: a file is missing or corrupt, or tensors do not fit the configuration.
        ConfigError: the architecture is not supported.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        generation = self._path / "generation_config.json"
        self._config = from_hf_config(
            read_json(self._path / "config.json"),
            name=self._path.name,
            generation_config=read_json(generation) if generation.exists() else None,
        )
        self._files = _tensor_files(self._path)
        shapes = self._read_shapes()
        embedding = next((n for n in shapes if n.endswith(EMBEDDING)), None)
        if embedding is None:
            raise CheckpointError(f"{self._path}: tensor {EMBEDDING} is missing")
        lm_head = next((n for n in shapes if n.endswith("lm_head.weight")), "lm_head.weight")
        prefix = embedding.removesuffix(EMBEDDING)
        self._sources = hf_sources(self._config, prefix, lm_head)

        def ignored(name: str) -> bool:
            tied_head = self._config.tie_embeddings and name == lm_head
            return tied_head or any(part in name for part in IGNORED_PARTS)

        check_tensors(self._sources, shapes, ignored, self._path)

    @property
    def config(self) -> ModelConfig:
        """The model's architecture, from config.json and generation_config.json."""
        return self._config

    @property
    def names(self) -> frozenset[str]:
        """Names of all parameters."""
        return frozenset(self._sources)

    @property
    def tokenizer_path(self) -> Path:
        """The directory itself."""
        return self._path

    def read(self, name: str) -> np.ndarray:
        """Read one parameter, in float32 or, where it is stored so, bfloat16."""
        if name not in self._sources:
            raise CheckpointError(f"{self._path}: there is no parameter {name}")
        source = self._sources[name]
        return combine_source(source, {t: self._read_tensor(t) for t in source.tensors})

    def _read_tensor(self, name: str) -> np.ndarray:
        file = self._files[name]
        try:
            with safe_open(file, framework="numpy") as opened:
                return opened.get_tensor(name)
        except (OSError, SafetensorError, TypeError) as error:  # TypeError: numpy lacks the type
            raise CheckpointError(f"cannot read tensor {name} of {file}: {error}") from error

    def _read_shapes(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for file in sorted(set(self._files.values())):
            try:
                with safe_open(file, framework="numpy") as opened:
                    for name in opened.keys():  # noqa: SIM118 (it is not a dict)
                        if self._files.get(name) == file:
                            shapes[name] = tuple(opened.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"cannot read {file}: {error}") from error
        return shapes


def _tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> the file it is in."""
    if (path / INDEX).exists():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path / INDEX} has no weight_map")
        return {name: path / file for name, file in weight_map.items()}
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise CheckpointError(
            f"{path} has {len(files)} *.safetensors files and no {INDEX}; expected one or an index"
        )
    try:
        with safe_open(files[0], framework="numpy") as opened:
            return dict.fromkeys(opened.keys(), files[0])
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {files[0]}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return data
