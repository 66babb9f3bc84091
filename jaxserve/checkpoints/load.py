"""Opens any checkpoint and places its parameters on devices."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxserve.checkpoints.base import MARKER, Checkpoint
from jaxserve.checkpoints.gguf import GgufCheckpoint
from jaxserve.checkpoints.gguf_file import whole_files
from jaxserve.checkpoints.quantised.rows import concatenate, map_rows
from jaxserve.checkpoints.quantised.search import quantise_float
from jaxserve.checkpoints.safetensors import SafetensorsCheckpoint
from jaxserve.core.errors import CheckpointError
from jaxserve.models.parameters import Parameter, Shape
from jaxserve.models.weights import DENSE, Parts, Weight, dense, storage_of
from pallas_kernels.weights import Format, Quantised

PROGRESS_DELAY = 2.0  # seconds of loading before a bar appears


def open_checkpoint(path: Path, *, allow_unknown: bool = False) -> Checkpoint:
    """Open a GGUF file, a Hugging Face directory or a directory from `jaxserve convert`.

    A directory with nothing but one GGUF file in it (as `pull` leaves), or the parts of one,
    stands for that file.

    Args:
        path: where it is.
        allow_unknown: go on with keys of its configuration that are not known, see
            `models.config_keys`.

    Raises:
        CheckpointError: nothing is there, the kind is unknown, or the checkpoint is corrupt.
        ConfigError: the model's architecture is not supported.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return GgufCheckpoint(path, allow_unknown=allow_unknown)
        raise CheckpointError(f"{path}: only .gguf files are checkpoints by themselves")
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}")
    if (path / MARKER).exists():
        from jaxserve.checkpoints.orbax import OrbaxCheckpoint  # Orbax takes a second to import

        return OrbaxCheckpoint(path)
    if (path / "config.json").exists():
        return SafetensorsCheckpoint(path, allow_unknown=allow_unknown)
    gguf_files = whole_files(path.glob("*.gguf"))
    if len(gguf_files) == 1:
        return GgufCheckpoint(gguf_files[0], allow_unknown=allow_unknown)
    if gguf_files:
        names = ", ".join(file.name for file in gguf_files[:5])
        raise CheckpointError(
            f"{path} holds {len(gguf_files)} GGUF files; name one of them: {names}"
        )
    raise CheckpointError(
        f"{path} holds no checkpoint: expected config.json with *.safetensors, {MARKER}, or a "
        "GGUF file"
    )


def load_params(
    checkpoint: Checkpoint,
    targets: Mapping[str, Any],
    *,
    progress: bool = True,
) -> dict[str, Weight]:
    """Read every parameter onto its devices, each device getting only its own shard.

    Args:
        checkpoint: an open checkpoint.
        targets: for every parameter the shapes, types and shardings (None: the default device)
            wanted, see `models.weights.abstract_weight`. Those of attention may have n times the
            checkpoint's KV heads, each with 1/n of its query heads (`Parameter.repeats`). What is
            quantised in another format, or not at all, is quantised while it is read.
        progress: show a bar on stderr, if that is a terminal and loading takes long.

    Raises:
        CheckpointError: a parameter is missing, not wanted, of another shape, or unreadable.
    """
    stored = checkpoint.parameters
    _check_names(checkpoint.names, targets)
    targets = {name: jax.tree.map(_with_sharding, target) for name, target in targets.items()}
    whole = {name: one for name, one in targets.items() if _shape(one) == stored[name].shape}
    params: dict[str, Weight] = dict(checkpoint.restore(whole))
    rest = [name for name in targets if name not in params]
    # `disable=None` is tqdm's "only on a terminal".
    for name in tqdm(rest, "loading weights", delay=PROGRESS_DELAY,
                     disable=None if progress else True):  # fmt: skip
        target = targets[name]
        if name in whole and storage_of(target) == DENSE:
            value = checkpoint.read(name)
        else:
            parts = _repeated(name, stored[name], checkpoint.read_parts(name), target)
            value = held_as(target, stored[name], parts)
        params[name] = jax.tree.map(_place, value, target)
    return {name: params[name] for name in targets}


def _repeated(
    name: str, parameter: Parameter, parts: list[np.ndarray | Quantised], target: Any
) -> list[np.ndarray | Quantised]:
    """The parts with as many KV heads as `target` has."""
    wanted = _shape(target)
    times = wanted[0] // parameter.shape[0]
    if parameter.repeats and times > 1:
        with contextlib.suppress(ValueError):  # heads that cannot be dealt out evenly
            parts = [
                map_rows(lambda array, repeat=repeat: repeat(array, times), part)
                for repeat, part in zip(parameter.repeats, parts, strict=True)
            ]
    length = sum(part.shape[parameter.joined] for part in parts)
    shape = list(parts[0].shape)
    shape[parameter.joined] = length
    if tuple(shape) != wanted:
        raise CheckpointError(
            f"parameter {name} has shape {parameter.shape}, the model wants {wanted}"
        )
    return parts


def _shape(target: Any) -> Shape:
    """The shape of the parameter that a target stands for."""
    if not isinstance(target, Parts):
        return tuple(target.shape)
    shape = list(target.parts[0].shape)
    shape[target.axis] = sum(part.shape[target.axis] for part in target.parts)
    return tuple(shape)


def held_as(
    target: Any,
    parameter: Parameter,
    parts: Sequence[np.ndarray | Quantised],
    in_type: Callable[[np.ndarray], np.ndarray] = lambda value: value,
) -> Any:
    """The parameter of these parts in the form of `target`, in NumPy.

    Args:
        target: the shapes of a `Weight`.
        parameter: its declaration.
        parts: arranged already; what is quantised in another format is quantised anew.
        in_type: applied to parts that are held as arrays.
    """

    def held(one: Any, part: np.ndarray | Quantised) -> Any:
        if isinstance(one, Quantised):
            return _in_format(one.format, part)
        return in_type(dense(part))

    if isinstance(target, Parts):
        pairs = zip(target.parts, parts, strict=True)
        return Parts(tuple(held(*pair) for pair in pairs), target.axis)
    each = [held(target, part) for part in parts]
    if isinstance(target, Quantised) and len(each) > 1:
        return concatenate(*each, axis=parameter.joined)
    return parameter.join(each)


def _in_format(format: Format, part: np.ndarray | Quantised) -> Quantised:
    if isinstance(part, Quantised) and part.format == format:
        return part
    return quantise_float(dense(part), format)


def _check_names(found: frozenset[str], wanted: Mapping[str, object]) -> None:
    if missing := sorted(set(wanted) - found):
        raise CheckpointError(f"the checkpoint lacks parameter {missing[0]}")
    if extra := sorted(found - set(wanted)):
        raise CheckpointError(f"the model has no place for parameter {extra[0]}")


def _with_sharding(target: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if target.sharding is not None:
        return target
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=sharding)


def _place(value: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
    value = value.astype(target.dtype, copy=False)
    # A shard is copied, so that no device's array keeps the whole parameter alive.
    return jax.make_array_from_callback(
        target.shape, target.sharding, lambda index: np.ascontiguousarray(value[index])
    )
