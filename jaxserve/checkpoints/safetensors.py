"""Hugging Face checkpoint directories: config.json, *.safetensors, tokenizer files."""

import contextlib
import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxserve.checkpoints.base import Checkpoint
from jaxserve.checkpoints.tensors import check_tensors, widened
from jaxserve.core.errors import CheckpointError
from jaxserve.core.sampling_defaults import SamplingDefaults, from_generation_config
from jaxserve.models.config import ModelConfig
from jaxserve.models.config_hf import from_hf_config
from jaxserve.models.parameters import HF_EMBEDDING, HF_HEAD, HF_PREFIX, Piece, Shape

GENERATION_CONFIG = "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Vision parts of Gemma 3, and buffers that old files carry along.
IGNORED_PARTS = ("vision_tower.", "multi_modal_projector.", "rotary_emb.inv_freq")
DTYPES = ("F64", "F32", "F16", "BF16")
COMPARED_ROWS = 4096  # of an embedding at a time

log = logging.getLogger(__name__)


class SafetensorsCheckpoint(Checkpoint):
    """A Hugging Face model directory, weights in one file or several with an index.

    Where a configuration says that the embeddings are tied, and another output projection is
    stored beside them, that one is used, as transformers does.

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
        config = from_hf_config(
            values,
            name=self._path.name,
            generation_config=generation,
            allow_unknown=allow_unknown,
        )
        # Old checkpoints have them in config.json, where a generation_config.json is missing.
        self._sampling = from_generation_config(
            values if generation is None else generation, str(self._path / where)
        )
        self._files = _tensor_files(self._path)
        headers = self._read_headers()
        embedding = next((n for n in headers if n.endswith(HF_EMBEDDING)), None)
        if embedding is None:
            raise CheckpointError(f"{self._path}: tensor {HF_EMBEDDING} is missing")
        lm_head = next((n for n in headers if n.endswith(HF_HEAD)), HF_HEAD)
        if config.tie_embeddings and lm_head in headers and not self._equal(embedding, lm_head):
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

        shapes = {name: header.shape for name, header in headers.items()}
        check_tensors(pieces, shapes, ignored, self._path)
        for name in (piece.tensor for piece in pieces):
            if headers[name].dtype not in DTYPES:
                raise CheckpointError(
                    f"{self._path}: tensor {name} has type {headers[name].dtype}; supported: "
                    f"{', '.join(DTYPES)} (quantised checkpoints only as GGUF)"
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
        if name not in self._pieces:
            raise CheckpointError(f"{self._path}: there is no parameter {name}")
        parts = [
            piece.arrange(widened(piece.tensor, self._read_tensor(piece.tensor)))
            for piece in self._pieces[name]
        ]
        return self.parameters[name].join(parts)

    def _read_tensor(self, name: str) -> np.ndarray:
        with _opened(self._files[name]) as opened:
            return opened.get_tensor(name)

    def _equal(self, first: str, second: str) -> bool:
        """Whether two matrices are the same, read a part at a time."""
        with _opened(self._files[first]) as one, _opened(self._files[second]) as other:
            a, b = one.get_slice(first), other.get_slice(second)
            shape = a.get_shape()
            if shape != b.get_shape() or a.get_dtype() != b.get_dtype() or len(shape) != 2:
                return False
            rows, step = shape[0], COMPARED_ROWS
            parts = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
            return all(a[part].tobytes() == b[part].tobytes() for part in parts)

    def _read_headers(self) -> "dict[str, _Header]":
        headers: dict[str, _Header] = {}
        for file in sorted(set(self._files.values())):
            with _opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (it is not a dict)
                    if self._files.get(name) == file:
                        tensor = opened.get_slice(name)
                        headers[name] = _Header(tuple(tensor.get_shape()), tensor.get_dtype())
        return headers


class _Header(NamedTuple):
    """A tensor as its file lists it; the type by safetensors' name."""

    shape: Shape
    dtype: str


def _named_as_here(piece: Piece, prefix: str, lm_head: str) -> Piece:
    """A declared piece under the name that a file has for its tensor.

    Args:
        piece: as its family declares it.
        prefix: what stands in the place of `HF_PREFIX`.
        lm_head: the name of the output projection.
    """
    name = lm_head if piece.tensor == HF_HEAD else prefix + piece.tensor.removeprefix(HF_PREFIX)
    return dataclasses.replace(piece, tensor=name)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """An open safetensors file, whose errors are CheckpointErrors."""
    try:
        with safe_open(file, framework="numpy") as opened:
            yield opened
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


def _tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> the file it is in, looked for as transformers does.

    Other files may lie beside them: adapters, the same weights under other names, other parts.
    """
    if (path / SINGLE).exists():
        files = [path / SINGLE]
    elif (path / INDEX).exists():
        return _indexed_files(path)
    else:
        files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "no *.safetensors"
        raise CheckpointError(f"{path} has neither {SINGLE} nor {INDEX}; it has {found}")
    with _opened(files[0]) as opened:
        return dict.fromkeys(opened.keys(), files[0])


def _indexed_files(path: Path) -> dict[str, Path]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX} has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(f"{path / INDEX} names {file!r}, which is no file beside it")
    return {name: path / file for name, file in weight_map.items()}


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
