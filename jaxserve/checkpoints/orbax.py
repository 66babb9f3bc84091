"""jaxserve's own checkpoint directory: Orbax arrays, configuration and tokenizer together.

    DIR/jaxserve.json   format, version, the fields of ModelConfig, sampling defaults, how weights
                        are held that are not one array, and what their files must be like
    DIR/weights/        Orbax, the arrays of every parameter (`_keyed` names those of several)
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
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxserve.checkpoints.base import MARKER, Checkpoint
from jaxserve.checkpoints.quantised.rows import map_rows
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
from jaxserve.models.registry import parameters_of
from jaxserve.models.weights import DENSE, Parts, Storage, Weight, dense, storage_of, weight_shapes
from pallas_kernels.weights import Format, Quantised

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
            self._storage = _storage_of(marker.get("storage", {}))
        except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{self._path / MARKER} is corrupt: {error}") from error
        self._check_files(marker.get("files", {}))
        self._check_arrays()

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
        """Read one parameter as it is stored; a quantised one in float32."""
        if name not in self.parameters:
            raise CheckpointError(f"{self._path}: there is no parameter {name}")
        return self.parameters[name].join([dense(part) for part in self._stored_parts(name)])

    def formats(self, name: str) -> tuple[Format | None, ...]:
        """How each part is quantised, None where it is not."""
        storage = self._storage.get(name, DENSE)
        return storage * (len(super().formats(name)) if len(storage) == 1 else 1)

    def read_parts(self, name: str) -> list[np.ndarray | Quantised]:
        """One parameter's parts as they are stored."""
        parameter, parts = self.parameters[name], self._stored_parts(name)
        if len(parts) > 1:
            return parts
        count = len(parameter.part_sizes or (1,))
        return [
            map_rows(lambda array, part=part: parameter.split(array)[part], parts[0])
            for part in range(count)
        ]

    def restore(self, targets: Mapping[str, Any]) -> dict[str, Weight]:
        """Restore straight onto the targets' shardings, each device reading its own shard."""
        same = {
            name: target
            for name, target in targets.items()
            if storage_of(target) == self._storage.get(name, DENSE)
        }
        item = {key: one for name, target in same.items() for key, one in _keyed(name, target)}
        found = self._restore(item, ocp.checkpoint_utils.construct_restore_args(item))
        return {
            name: jax.tree.unflatten(
                jax.tree.structure(target), [found[key] for key, _ in _keyed(name, target)]
            )
            for name, target in same.items()
        }

    def _stored_parts(self, name: str) -> list[np.ndarray | Quantised]:
        storage = self._storage.get(name, DENSE)
        weight: Any = _skeleton(storage, self.parameters[name].joined)
        keys = [key for key, _ in _keyed(name, weight)]
        args = dict.fromkeys(keys, ocp.RestoreArgs(restore_type=np.ndarray))
        found = self._restore(dict.fromkeys(keys, 0), args)
        weight = jax.tree.unflatten(jax.tree.structure(weight), [found[key] for key in keys])
        return [*weight.parts] if isinstance(weight, Parts) else [weight]

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

    def _check_arrays(self) -> None:
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                metadata = checkpointer.metadata(self._path / WEIGHTS).item_metadata
        except Exception as error:  # as above
            raise CheckpointError(
                f"cannot read {self._path / WEIGHTS}: {_reason(error)}"
            ) from error
        if metadata is None:
            raise CheckpointError(f"{self._path / WEIGHTS} is missing or corrupt")
        arrays = {key: tuple(array.shape) for key, array in dict(metadata.tree).items()}
        if self._config.tie_embeddings and {"lm_head", "lm_head.values"} & arrays.keys():
            # What is stored is used.
            self._config = dataclasses.replace(self._config, tie_embeddings=False)
        _check_shapes(arrays, self._config, self._storage, self._path)


def write_orbax(
    path: Path,
    config: ModelConfig,
    params: Iterable[tuple[str, Any]],
    save_tokenizer: Callable[[Path], object],
    sampling: SamplingDefaults | None = None,
) -> None:
    """Write a checkpoint directory, which appears only when it is complete.

    All parameters are in host memory at once while they are written.

    Args:
        path: the directory to make; it must not exist.
        config: the model's architecture.
        params: every parameter by name, as its family declares it: a `Weight` of NumPy arrays.
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
        arrays: dict[str, np.ndarray] = {}
        storage: dict[str, Storage] = {}
        for name, weight in params:
            arrays |= dict(_keyed(name, weight))
            if (held := storage_of(weight)) != DENSE:
                storage[name] = held
        shapes = {key: array.shape for key, array in arrays.items()}
        _check_shapes(shapes, config, storage, path)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(work / WEIGHTS, args=ocp.args.PyTreeSave(arrays))
        marker = {
            "format": FORMAT,
            "version": VERSION,
            "config": config_to_dict(config),
            "generation": to_generation_config(sampling or {}),
            "storage": {
                name: [one and dataclasses.asdict(one) for one in held]
                for name, held in storage.items()
            },
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


def _keyed(name: str, weight: Any) -> list[tuple[str, Any]]:
    """The arrays of a weight, by what they are called in the directory."""
    if isinstance(weight, Parts):
        return [pair for i, part in enumerate(weight.parts) for pair in _keyed(f"{name}.{i}", part)]
    if not isinstance(weight, Quantised):
        return [(name, weight)]
    fields = ("values", "scales", "minimums")[: 3 if weight.format.has_minimums else 2]
    return [(f"{name}.{field}", getattr(weight, field)) for field in fields]


def _skeleton(storage: Storage, axis: int) -> Any:
    """A weight that is held so, with numbers in place of its arrays."""
    parts = [
        0 if format is None else Quantised(0, 0, 0 if format.has_minimums else None, format)
        for format in storage
    ]
    return parts[0] if len(parts) == 1 else Parts(tuple(parts), axis)


def _storage_of(marker: Mapping[str, Any]) -> dict[str, Storage]:
    return {
        name: tuple(None if one is None else Format(**one) for one in held)
        for name, held in marker.items()
    }


def _check_shapes(
    found: Mapping[str, Shape], config: ModelConfig, storage: Mapping[str, Storage], where: Path
) -> None:
    """Raise CheckpointError unless these arrays are all that a model is made of."""
    expected: dict[str, Shape] = {}
    for name, parameter in parameters_of(config).items():
        try:
            weight = weight_shapes(parameter, storage.get(name, DENSE))
        except ValueError as error:
            raise CheckpointError(f"{where}: parameter {name}: {error}") from error
        expected |= {key: shape.shape for key, shape in _keyed(name, weight)}
    for key, shape in expected.items():
        if key not in found:
            raise CheckpointError(f"{where}: parameter {key} is missing")
        if found[key] != shape:
            raise CheckpointError(
                f"{where}: parameter {key} has shape {found[key]}, expected {shape}"
            )
    check_no_extra(found, expected, lambda _: False, where)


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
