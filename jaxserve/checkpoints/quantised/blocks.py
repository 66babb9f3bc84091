"""How far one scale reaches: over a tensor, a row, a group of a row, or a block of several rows."""

import dataclasses
import math

import numpy as np

from jaxserve.checkpoints.quantised.scheme import Shape, Shapes
from jaxserve.core.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The part of a matrix [out, in] that shares a scale.

    Attributes:
        rows: of a part; None for all.
        columns: of a part; None for all.
    """

    rows: int | None
    columns: int | None

    def shapes(self, shape: Shape) -> Shapes:
        """Shapes that a tensor of scales may have for a matrix [out, in].

        Raises:
            CheckpointError: rows are not whole groups.
        """
        down, across = (
            -(-size // (step or size))
            for size, step in zip(shape, (self.rows, self.columns), strict=True)
        )
        if self.rows == 1 and self.columns and shape[1] % self.columns:
            raise CheckpointError(
                f"rows of {shape[1]} numbers are not whole groups of {self.columns}"
            )
        flat: Shapes = ((down,),) if self.columns is None else ()
        whole: Shapes = ((),) if self == TENSOR else ()
        return ((down, across), *flat, *whole)

    def group(self, columns: int) -> int | None:
        """Inputs that share a scale, in groups of one size; None for all.

        A last block that is cut off makes smaller groups of all.
        """
        return None if self.columns is None else math.gcd(self.columns, columns)

    def spread(self, scales: np.ndarray, shape: Shape, rows: slice) -> np.ndarray:
        """Scales (or zero points) of some rows, group by group.

        Args:
            scales: in one of `shapes`.
            shape: (out, in).
            rows: of the matrix, without a step.

        Returns:
            [rows, groups], of the same type.
        """
        (down, across), *_ = self.shapes(shape)
        first, last, _ = rows.indices(shape[0])
        of_rows = scales.reshape(down, across)[np.arange(first, last) // (self.rows or shape[0])]
        group = self.group(shape[1])
        if self.columns is None or group is None or group == self.columns:
            return of_rows
        return np.repeat(of_rows, self.columns // group, axis=1)[:, : shape[1] // group]


TENSOR, CHANNEL = Blocks(None, None), Blocks(1, None)
