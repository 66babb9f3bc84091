"""How a Hugging Face checkpoint stores one weight matrix in few bits."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from jaxserve.checkpoints.quantised.words import nibble_blocks, unpack_words
from jaxserve.core.errors import CheckpointError
from pallas_kernels.weights import Format, Quantised, pack

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]
Activations = Literal["int8", "fp8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme(abc.ABC):
    """A way to store a matrix [out, in] as several tensors, named `MODULE.suffix`.

    Attributes:
        activations: what activations were meant to be rounded to before the product; None: to
            nothing. A product with activations as they are is only more exact.
    """

    activations: Activations | None = None

    @property
    @abc.abstractmethod
    def mark(self) -> str:
        """Suffix of the tensor that only a matrix stored in this way has."""

    @property
    @abc.abstractmethod
    def scales(self) -> str:
        """Suffix of the tensor of scales, whose type `format` takes."""

    @abc.abstractmethod
    def shape(self, found: Mapping[str, Shape]) -> Shape:
        """(out, in) of the matrix that tensors of such shapes, by suffix, hold if they fit.

        Raises:
            CheckpointError: a tensor is missing, or has other than two axes.
        """

    @abc.abstractmethod
    def tensors(self, shape: Shape) -> dict[str, Shapes]:
        """Suffix -> shapes of every tensor that a matrix [out, in] must have; one of each will do.

        Raises:
            CheckpointError: no matrix of this shape can be stored so.
        """

    def optional(self, shape: Shape) -> dict[str, Shapes]:
        """Suffix -> shapes of tensors that `read` takes where they are there."""
        del shape
        return {}

    def check(self, found: Mapping[str, Shape], shape: Shape) -> None:
        """Check that a matrix [out, in] can be read from tensors of such shapes.

        Args:
            found: suffix -> shape of the module's tensors.
            shape: (out, in).

        Raises:
            CheckpointError: one is missing, or has another shape.
        """
        needed = self.tensors(shape)
        for suffix, shapes in (needed | self.optional(shape)).items():
            if suffix in found and tuple(found[suffix]) not in shapes:
                wanted = " or ".join(map(str, shapes))
                raise CheckpointError(
                    f"tensor {suffix} has shape {tuple(found[suffix])}, expected {wanted}"
                )
        if missing := [suffix for suffix in needed if suffix not in found]:
            raise CheckpointError(f"tensor {missing[0]} is missing")

    @property
    def unused(self) -> frozenset[str]:
        """Suffixes of tensors that may lie beside them, and that the product does not need."""
        return frozenset()

    @abc.abstractmethod
    def format(self, shape: Shape, scales: str) -> Format:
        """The format of what `read` gives.

        Args:
            shape: (out, in).
            scales: type of the stored scales, as NumPy (or ml_dtypes) names it.

        Raises:
            CheckpointError: no format holds such a matrix.
        """

    @abc.abstractmethod
    def read(
        self, tensors: Mapping[str, np.ndarray], shape: Shape, rows: slice = slice(None)
    ) -> Quantised:
        """Take some rows (outputs) of a matrix [out, in] from its tensors.

        Args:
            tensors: by suffix, whole; of memory maps only those rows are touched.
            shape: (out, in).
            rows: which of the outputs, without a step.

        Returns:
            The weight, its columns in `order`, in NumPy.

        Raises:
            CheckpointError: the tensors contradict each other or the scheme.
        """

    def order(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Which input each column of the weight takes.

        Returns:
            int32 [in]; None where all are in order.

        Raises:
            CheckpointError: the tensor that says so is not an order of this scheme.
        """
        del tensors
        return None


def affine_format(
    bits: int, group: int | None, columns: int, scales: str, *, symmetric: bool
) -> Format:
    """The format that holds `(code - zero) * scale` for codes of that many bits.

    Two to four bits are held in four. With zero points, scales and minimums are float32: a minimum
    is the zero point times the scale, and has more digits than a scale in float16 has.

    Raises:
        CheckpointError: there is none for rows of so many numbers.
    """
    if not symmetric or scales not in ("float16", "bfloat16"):
        scales = "float32"
    codes = "int8" if bits == 8 else "int4"
    return checked_format(codes, group, columns, scales, has_minimums=not symmetric)


def checked_format(
    codes: str, group: int | None, columns: int, scales: str, *, has_minimums: bool = False
) -> Format:
    """A format of those names.

    Raises:
        CheckpointError: there is none for rows of so many numbers.
    """
    try:
        format = Format(codes, group or 0, scales, has_minimums)  # type: ignore[arg-type]
        format.check_inputs(columns)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return format


def affine_values(codes: np.ndarray, bits: int, format: Format) -> np.ndarray:
    """Codes (uint8 [rows, in], from 0 on) as they lie in memory in a format (`affine_format`)."""
    middle = 2 ** (bits - 1)
    if bits == 8:
        codes = codes ^ np.uint8(middle)  # which counts from -128 on as int8
    elif not format.has_minimums and middle != format.offset:
        codes = codes + np.uint8(format.offset - middle)
    return pack(codes.view(format.value_type), format)


def word_values(
    words: np.ndarray, bits: int, columns: int, order: np.ndarray | None, format: Format
) -> np.ndarray:
    """Codes that lie in words one after the other, as they lie in memory in a format.

    Args:
        words: int32 or uint32 [rows, words of a row].
        bits: of a code.
        columns: codes in a row; what is in a word after them is left out.
        order: see `Scheme.order`.
        format: of the result (`affine_format`).
    """
    if bits == 4 and order is None:
        return nibble_blocks(words)
    codes = unpack_words(words, bits)[:, :columns]
    return affine_values(codes if order is None else np.take(codes, order, 1), bits, format)


def affine_weight(
    values: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, format: Format
) -> Quantised:
    """The weight of `(code - zero) * scale`.

    Equal to that product in float32 to the last bit where scales are float16 or bfloat16: code
    times scale, zero times scale and their difference all have at most 24 bits. Where they are
    float32 the minimum is rounded once more.

    Args:
        values: codes as they lie in memory.
        scales: [rows, groups].
        zeros: uint8 [rows, groups]; None: all are in the middle.
        format: of the result (`affine_format`).
    """
    minimums = None
    if zeros is not None:
        first = -128 if format.codes == "int8" else 0
        minimums = (first + zeros.astype(np.float32)) * -scales.astype(np.float32)
    scales = np.ascontiguousarray(scales.astype(format.scale))
    weight = Quantised(values, scales, minimums, format)
    weight.check()
    return weight


def sizes_of(found: Mapping[str, Shape], suffix: str) -> tuple[int, int]:
    """Rows and columns of a tensor.

    Raises:
        CheckpointError: it is missing, or no matrix.
    """
    if suffix not in found:
        raise CheckpointError(f"tensor {suffix} is missing")
    shape = found[suffix]
    if len(shape) != 2:
        raise CheckpointError(f"tensor {suffix} has shape {tuple(shape)}, expected a matrix")
    return shape[0], shape[1]


def num_groups(columns: int, group: int | None) -> int:
    """Groups in a row.

    Raises:
        CheckpointError: a row is not whole groups.
    """
    if columns % (group or columns):
        raise CheckpointError(f"rows of {columns} numbers are not whole groups of {group}")
    return columns // (group or columns)


def group_order(g_idx: np.ndarray, group: int | None) -> np.ndarray | None:
    """Which input each column takes, once columns lie in the order of their groups.

    Args:
        g_idx: [in], the group of each input.
        group: size of every group; None for one that has all.

    Returns:
        int32 [in], within a group in the inputs' order; None where it is all inputs in order.

    Raises:
        CheckpointError: groups are not of that size.
    """
    if group is None:
        return None
    counts = np.bincount(g_idx) if g_idx.min() >= 0 else np.zeros(0)
    if not np.array_equal(counts, np.full(len(g_idx) // group, group)):
        raise CheckpointError(f"the tensor g_idx does not divide its inputs into groups of {group}")
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    return None if np.array_equal(order, np.arange(len(order))) else order
