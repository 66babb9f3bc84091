"""Reads the GGUF file format: metadata at once, tensors on demand from a memory map.

The `gguf` package's own reader makes several numpy views for every token of the vocabulary,
which takes 10 s for Gemma's 262,144; this one takes the header apart with `struct` and leaves
only dequantisation to the package. Format: ggml's docs/gguf.md, versions 2 and 3.
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from jaxserve.core.errors import CheckpointError

_SCALARS: dict[int, str] = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h", GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?", GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip
_PLAIN = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.F64: np.dtype("<f8"),
}
_PART_SIZE = 2**16  # elements, a multiple of every block size


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` in row-major order, `start` and `size` in bytes."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


class GgufFile:
    """One GGUF file.

    Attributes:
        metadata: key -> int, float, bool, str, or a list of those.
        tensors: tensor name -> TensorInfo.

    Raises:
        CheckpointError: the file is missing, truncated, or not GGUF version 2 or 3.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            with self.path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # mmap refuses an empty file by ValueError
            raise CheckpointError(f"cannot read {self.path}: {error}") from error
        self._offset = 0
        try:
            self._parse()
        except (struct.error, ValueError, KeyError, OverflowError) as error:
            raise CheckpointError(
                f"{self.path} is truncated or not a GGUF file: {error}"
            ) from error

    def read(self, name: str) -> np.ndarray:
        """Dequantise one tensor to float32 [shape].

        Raises:
            CheckpointError: the quantisation type is not supported.
        """
        info = self.tensors[name]
        raw = np.frombuffer(self._data, np.uint8, info.size, info.start)
        if info.kind in _PLAIN:
            return raw.view(_PLAIN[info.kind]).reshape(info.shape).astype(np.float32)
        block_size, block_bytes = GGML_QUANT_SIZES[info.kind]
        # A part at a time, as one long row each: it stays in the processor's cache, and the
        # package would cut more rows into groups of 16, which costs more than the arithmetic.
        out = np.empty(info.shape, np.float32)
        flat, step = out.reshape(-1), _PART_SIZE // block_size * block_size
        try:
            for i in range(0, flat.size, step):
                end = min(i + step, flat.size)
                part = raw[i // block_size * block_bytes : end // block_size * block_bytes]
                flat[i:end] = dequantize(part, info.kind)
            return out
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} has the unsupported type {info.kind.name}"
            ) from error

    def _parse(self) -> None:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._offset = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported")
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        for _ in range(num_keys):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = int(self.metadata.get("general.alignment", 32))
        base = -(-self._offset // alignment) * alignment
        for name, info in infos:
            info = dataclasses.replace(info, start=base + info.start)
            if info.start + info.size > len(self._data):
                raise ValueError(f"tensor {name} reaches beyond the end of the file")
            self.tensors[name] = info

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._offset)
        self._offset += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        start = self._offset + 8
        (length,) = struct.unpack_from("<Q", self._data, self._offset)
        if start + length > len(self._data):
            raise ValueError("a string reaches beyond the end of the file")
        self._offset = start + length
        return self._data[start : start + length].decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != GGUFValueType.ARRAY:
            raise ValueError(f"unknown value type {kind}")
        item_kind, length = self._scalar("I"), self._scalar("Q")
        if item_kind in _SCALARS:
            layout = f"<{length}{_SCALARS[item_kind]}"
            values = struct.unpack_from(layout, self._data, self._offset)
            self._offset += struct.calcsize(layout)
            return list(values)
        return [self._value(item_kind) for _ in range(length)]

    def _tensor_info(self) -> tuple[str, TensorInfo]:
        name = self._string()
        num_dims = self._scalar("I")
        shape = tuple(self._scalar("Q") for _ in range(num_dims))[::-1]
        kind = GGMLQuantizationType(self._scalar("I"))
        start = self._scalar("Q")
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block_size:
            raise ValueError(f"tensor {name} has rows that are not whole blocks")
        size = math.prod(shape) // block_size * block_bytes
        return name, TensorInfo(shape, kind, start, size)
