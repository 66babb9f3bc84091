"""Tensors of other people's files: checked against what a model declares."""

from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

from jaxserve.core.errors import CheckpointError
from jaxserve.models.parameters import Piece, Shape


def widened(name: str, tensor: np.ndarray) -> np.ndarray:
    """A dense tensor as parameters are made of: float16 and float64 become float32.

    Raises:
        CheckpointError: it has a type that is not a supported floating type.
    """
    if tensor.dtype == np.float16 or tensor.dtype == np.float64:
        return tensor.astype(np.float32)
    if tensor.dtype == np.float32 or tensor.dtype.name == "bfloat16":
        return tensor
    raise CheckpointError(f"tensor {name} has type {tensor.dtype}, which is not supported")


def check_tensors(
    pieces: Iterable[Piece],
    found: Mapping[str, Shape],
    ignored: Callable[[str], bool],
    where: object,
) -> None:
    """Check that a file holds exactly the tensors wanted, in the shapes wanted.

    Args:
        pieces: of all parameters.
        found: tensor name -> shape, of the file.
        ignored: whether a tensor that no parameter needs may be left unread.
        where: the file, for messages.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or would go unused.
    """
    wanted = {piece.tensor: piece.shape for piece in pieces}
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
