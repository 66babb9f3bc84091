"""jaxserve's own checkpoint directory: Orbax arrays, configuration and tokenizer together.

    DIR/jaxserve.json   format, version, the fields of ModelConfig, sampling defaults, and what
                        the files of the weights must be like
    DIR/weights/        Orbax, one array per parameter, as the model's family declares it
    DIR/tokenizer/      what Tokenizer.save wrote, chat template included

Orbax reads any slice of an array, so restoring onto a mesh gives each device its own shard
and no host ever holds a whole parameter.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxserve.checkpoints.base import MARKER, Checkpoint
from jaxserve.checkpoints.safetensors import read_json
from jaxserve.checkpoints.tensors import check_no_extra
from jaxserve.core.errors import CheckpointError, ConfigError
from jaxserve.core.sampling_defaults import (
    SamplingDefaults,
    from_generation_config,
    to_generation_config,
)
from jaxserve.models.config import ModelConfig
from jaxserve.models.config_readers import config_from_dict, config_to_dict
from jaxserve.models.parameters import Shape
from jaxserve.models.registry import parameter_shapes

WEIGHTS = "weights"
TOKENIZER = "tokenizer"
FORMAT = "jaxserve-orbax"
VERSION = 2
DIGESTED_BYTES = 2**20  # of larger files only the size is checked: they take long to read
MAX_REASON = 300  # characters of what the libraries say, the rest are their own specifications


class OrbaxCheckpoint(Checkpoint):
    """A directory that `write_orbax` wrote.

    Raises:
        CheckpointError: a part is missing or corrupt, or arrays do not fit the configuration.
    """

    def __init__(self, path: Path) -> None:
        # Orbax refuses relative paths.
        self._path = Path(path).resolve()
        marker = read_json(self._path / MARKER)
        if marker.get("format") != FORMAT or marker.get("version") != VERSION:
            raise CheckpointError(
                f"{self._path / MARKER}: expected format {FORMAT} version {VERSION}, got "
                f"{marker.get('format')} version {marker.get('version')}: convert the original "
                "checkpoint again"
            )
        try:
            self._config = config_from_dict(marker["config"])
            self._sampling = from_generation_config(
                marker.get("generation", {}), str(self._path / MARKER)
            )
        except (ConfigError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self._path / MARKER} is corrupt: {error}") from error
        self._check_files(marker.get("files", {}))
        self._dtypes = self._check_arrays()

    @property
    def config(self) -> ModelConfig:
        """The model's architecture."""
        return self._config

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's directory."""
        return self._path / TOKENIZER

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        """Those of the checkpoint that it was converted from."""
        return self._sampling

    def read(self, name: str) -> np.ndarray:
        """Read one parameter as it is stored."""
        if name not in self._dtypes:
            raise CheckpointError(f"{self._path}: there is no parameter {name}")
        args = {name: ocp.RestoreArgs(restore_type=np.ndarray)}
        return self._restore({name: 0}, args)[name]

    def restore(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Restore straight onto the targets' shardings, each device reading its own shard."""
        item = dict(targets)
        return self._restore(item, ocp.checkpoint_utils.construct_restore_args(item))

    def _restore(self, item: dict, restore_args: dict) -> dict:
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                return checkpointer.restore(self._path / WEIGHTS, args=args)
        except Exception as error:  # Orbax and TensorStore raise every kind
            raise CheckpointError(
                f"cannot restore {self._path / WEIGHTS}: {_reason(error)}"
            ) from error

    def _check_files(self, expected: object) -> None:
        """Find files that are cut short before Orbax does, which reports them at great length."""
        if not isinstance(expected, dict):
            raise CheckpointError(f"{self._path / MARKER} is corrupt: files is not an object")
        for name, facts in expected.items():
            file = self._path / WEIGHTS / name
            try:
                found = _facts(file)
            except OSError as error:
                raise CheckpointError(
                    f"the checkpoint is damaged: cannot read {file}: {error.strerror}"
                ) from error
            if found != facts:
                size = facts[0] if isinstance(facts, list) and facts else facts
                raise CheckpointError(
                    f"the checkpoint is damaged: {file} has {found[0]} bytes of {size}"
                    if found[0] != size
                    else f"the checkpoint is damaged: {file} has other contents than were written"
                )

    def _check_arrays(self) -> dict[str, np.dtype]:
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                metadata = checkpointer.metadata(self._path / WEIGHTS).item_metadata
        except Exception as error:  # as above
            raise CheckpointError(
                f"cannot read {self._path / WEIGHTS}: {_reason(error)}"
            ) from error
        if metadata is None:
            raise CheckpointError(f"{self._path / WEIGHTS} is missing or corrupt")
        arrays = dict(metadata.tree)
        if self._config.tie_embeddings and "lm_head" in arrays:  # what is stored is used
            self._config = dataclasses.replace(self._config, tie_embeddings=False)
        shapes = parameter_shapes(self._config)
        for name, shape in shapes.items():
            if name not in arrays:
                raise CheckpointError(f"{self._path}: parameter {name} is missing")
            if tuple(arrays[name].shape) != shape:
                raise CheckpointError(
                    f"{self._path}: parameter {name} has shape {tuple(arrays[name].shape)}, "
                    f"expected {shape}"
                )
        check_no_extra(arrays, shapes, lambda _: False, self._path)
        return {name: np.dtype(array.dtype) for name, array in arrays.items()}


def write_orbax(
    path: Path,
    config: ModelConfig,
    params: Iterable[tuple[str, np.ndarray]],
    save_tokenizer: Callable[[Path], object],
    sampling: SamplingDefaults | None = None,
) -> None:
    """Write a checkpoint directory, which appears only when it is complete.

    All parameters are in host memory at once while they are written.

    Args:
        path: the directory to make; it must not exist.
        config: the model's architecture.
        params: every parameter by name, in the shapes that its family declares.
        save_tokenizer: called with an existing empty directory to write the tokenizer into.
        sampling: the model's defaults.

    Raises:
        CheckpointError: `path` exists, or the parameters do not fit `config`.
    """
    path = Path(path).resolve()
    if path.exists():
        raise CheckpointError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        (work / TOKENIZER).mkdir()
        save_tokenizer(work / TOKENIZER)
        arrays = dict(params)
        _check_shapes({name: array.shape for name, array in arrays.items()}, config)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(work / WEIGHTS, args=ocp.args.PyTreeSave(arrays))
        marker = {
            "format": FORMAT,
            "version": VERSION,
            "config": config_to_dict(config),
            "generation": to_generation_config(sampling or {}),
            "files": {
                str(file.relative_to(work / WEIGHTS)): _facts(file)
                for file in sorted((work / WEIGHTS).rglob("*"))
                if file.is_file()
            },
        }
        (work / MARKER).write_text(json.dumps(marker, indent=2) + "\n", "utf-8")
        work.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        work.rename(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_shapes(found: Mapping[str, Shape], config: ModelConfig) -> None:
    expected = parameter_shapes(config)
    if dict(found) != expected:
        wrong = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
        raise CheckpointError(f"parameter {wrong[0]} does not fit the configuration")


def _facts(file: Path) -> list[int | str]:
    """A file's size, and of a small one a digest of its bytes."""
    size = file.stat().st_size
    if size > DIGESTED_BYTES:
        return [size]
    return [size, hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()]


def _reason(error: Exception) -> str:
    """What a library says, without the specifications that TensorStore puts behind it."""
    text = re.split(r" \[|\n| See full", str(error), maxsplit=1)[0] or type(error).__name__
    return text if len(text) <= MAX_REASON else text[:MAX_REASON] + "..."


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
