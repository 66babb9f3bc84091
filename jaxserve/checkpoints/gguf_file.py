"""Tensors of a GGUF file, dequantised on demand from a memory map."""

import dataclasses
import math
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from jaxserve.core.errors import CheckpointError
from jaxserve.files.gguf_header import GgufTensor, map_file, read_gguf_header

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
        metadata: see `GgufHeader`.
        tensors: tensor name -> TensorInfo.

    Raises:
        CheckpointError: the file is missing, truncated, or not GGUF version 2 or 3.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._data = map_file(self.path)
        header = read_gguf_header(self._data, self.path)
        self.metadata = header.metadata
        self.tensors = {t.name: self._place(t, header.data_start) for t in header.tensors}

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

    def _place(self, tensor: GgufTensor, data_start: int) -> TensorInfo:
        try:
            kind = GGMLQuantizationType(tensor.kind)
        except ValueError:
            raise CheckpointError(
                f"{self.path}: tensor {tensor.name} has the unknown type {tensor.kind}"
            ) from None
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        if not tensor.shape or tensor.shape[-1] % block_size:
            raise CheckpointError(
                f"{self.path}: tensor {tensor.name} has rows that are not whole blocks"
            )
        start = data_start + tensor.offset
        size = math.prod(tensor.shape) // block_size * block_bytes
        if start + size > len(self._data):
            raise CheckpointError(
                f"{self.path} is truncated: tensor {tensor.name} reaches beyond its end"
            )
        return TensorInfo(tensor.shape, kind, start, size)
