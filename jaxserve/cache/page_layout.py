"""The arrays of a KV page, as they lie one after the other in its bytes."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """What a page is made of once it has left the device: values, and scales if it has some.

    A page of one array keeps its shape and type; one of several is their bytes.

    Attributes:
        shapes: of the arrays.
        dtypes: their types.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]

    @property
    def array_bytes(self) -> tuple[int, ...]:
        """Bytes of each array."""
        sizes = zip(self.shapes, self.dtypes, strict=True)
        return tuple(math.prod(shape) * dtype.itemsize for shape, dtype in sizes)

    @property
    def num_bytes(self) -> int:
        """Bytes of a page."""
        return sum(self.array_bytes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a page as it is stored."""
        return self.shapes[0] if len(self.shapes) == 1 else (self.num_bytes,)

    @property
    def dtype(self) -> np.dtype:
        """Of a page as it is stored."""
        return self.dtypes[0] if len(self.shapes) == 1 else np.dtype(np.uint8)

    def joined(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Pages [n, *shape] of their arrays, each [n, *its shape]; not copied if there is one."""
        if len(arrays) == 1:
            return arrays[0]
        pages = np.empty((len(arrays[0]), *self.shape), self.dtype)
        for part, array in zip(self.split(pages), arrays, strict=True):
            part[...] = array
        return pages

    def split(self, pages: np.ndarray) -> list[np.ndarray]:
        """Views of pages [n, *shape] as their arrays, each [n, *its shape]."""
        if len(self.shapes) == 1:
            return [pages]
        ends = np.cumsum(self.array_bytes)[:-1]
        parts = zip(np.split(pages, ends, axis=1), self.shapes, self.dtypes, strict=True)
        return [part.view(dtype).reshape(len(pages), *shape) for part, shape, dtype in parts]
