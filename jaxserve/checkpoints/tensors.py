"""Tensors of other people's files: checked against a declaration, and combined by it."""

from collections.abc import Callable, Collection, Mapping

import numpy as np

from jaxserve.core.errors import CheckpointError
from jaxserve.models.parameters import Shape, Source


def combine_source(source: Source, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Build a parameter from its source tensors, with float16 widened to float32.

    Raises:
        CheckpointError: a tensor has a type that is not a supported floating type.
    """
    return source.combine(*(_widen(name, tensors[name]) for name in source.tensors))


def _widen(name: str, tensor: np.ndarray) -> np.ndarray:
    if tensor.dtype == np.float16 or tensor.dtype == np.float64:
        return tensor.astype(np.float32)
    if tensor.dtype == np.float32 or tensor.dtype.name == "bfloat16":
        return tensor
    raise CheckpointError(f"tensor {name} has type {tensor.dtype}, which is not supported")


def check_tensors(
    sources: Collection[Source],
    found: Mapping[str, Shape],
    ignored: Callable[[str], bool],
    where: object,
) -> None:
    """Check that a file holds exactly the tensors wanted, in the shapes wanted.

    Args:
        sources: of every parameter.
        found: tensor name -> shape, of the file.
        ignored: whether a tensor that no parameter needs may be left unread.
        where: the file, for messages.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or would go unused.
    """
    wanted = {name: shape for s in sources for name, shape in s.tensors.items()}
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointError(f"{where}: tensor {name} is missing")
        if tuple(found[name]) != shape:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {tuple(found[name])}, expected {shape}"
            )
    check_no_extra(found, wanted, ignored, where)


def check_no_extra(
    found: Collection[str],
    wanted: Collection[str],
    ignored: Callable[[str], bool],
    where: object,
) -> None:
    """Raise CheckpointError for a tensor that the model would silently do without."""
    extra = sorted(name for name in found if name not in wanted and not ignored(name))
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise CheckpointError(f"{where}: tensor {extra[0]}{more} has no place in this model")
