"""Tensors of a GGUF file, or of one that is split into several, dequantised on demand."""

import dataclasses
import math
import mmap
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from jaxserve.checkpoints.quantised.gguf_blocks import quantised_format, read_blocks
from jaxserve.core.errors import CheckpointError
from jaxserve.files.gguf_header import GgufTensor, map_file, read_gguf_header
from pallas_kernels.weights import Format, Quantised

_PLAIN = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.F64: np.dtype("<f8"),
}
_PART_SIZE = 2**16  # elements, a multiple of every block size


# How llama.cpp names the parts of a split file: NAME-00001-of-00003.gguf.
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` in row-major order, `part` of the file, the rest in bytes."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    part: int
    start: int
    size: int


def parts_of(path: Path) -> list[Path]:
    """All parts of a split file, in order, given any of them; a whole file by itself."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = match["count"]
    return [
        path.with_name(f"{match['stem']}-{number:05}-of-{count}.gguf")
        for number in range(1, int(count) + 1)
    ]


def model_name(path: Path) -> str:
    """What a file's model is called: the file's name, of a split one without its number."""
    match = _PART.fullmatch(path.name)
    return match["stem"] if match else path.stem


def whole_files(paths: Iterable[Path]) -> list[Path]:
    """One path for each model among GGUF files, sorted: of a split one its first part.

    Vision parts (mmproj-...) are not models.
    """
    models: dict[tuple[str, ...], Path] = {}
    for path in sorted(path for path in paths if not path.name.startswith("mmproj")):
        match = _PART.fullmatch(path.name)
        models.setdefault((match["stem"], match["count"]) if match else (path.name,), path)
    return list(models.values())


class GgufFile:
    """One GGUF file, which may be split into several.

    Args:
        path: the file, or any part of it.

    Attributes:
        path: the file, or its first part, which has the metadata.
        metadata: see `GgufHeader`.
        tensors: tensor name -> TensorInfo, over all parts.

    Raises:
        CheckpointError: a file is missing, truncated, or not GGUF version 2 or 3.
    """

    def __init__(self, path: Path) -> None:
        paths = parts_of(Path(path))
        if missing := [part.name for part in paths if not part.is_file()]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"{paths[0].parent} has no file {missing[0]}{more}")
        self.path = paths[0]
        self._parts: list[tuple[Path, mmap.mmap]] = []
        self.tensors: dict[str, TensorInfo] = {}
        for number, part in enumerate(paths):
            data = map_file(part)
            header = read_gguf_header(data, part)
            self._parts.append((part, data))
            for tensor in header.tensors:
                self.tensors[tensor.name] = self._place(tensor, number, header.data_start)
            if number == 0:
                self.metadata = header.metadata
            if header.metadata.get("split.count", 1) not in (0, len(paths)):
                raise CheckpointError(
                    f"{part} is one of {header.metadata['split.count']} parts, which must be named "
                    "NAME-00001-of-00003.gguf and so on"
                )

    def read(self, name: str) -> np.ndarray:
        """Dequantise one tensor to float32 [shape].

        Raises:
            CheckpointError: the quantisation type is not supported.
        """
        info = self.tensors[name]
        path, raw = self._parts[info.part][0], self._raw(info)
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
                f"{path}: tensor {name} has the unsupported type {info.kind.name}"
            ) from error

    def format(self, name: str) -> Format | None:
        """The format that `read_quantised` gives; None if the tensor is not quantised in one."""
        return quantised_format(self.tensors[name].kind)

    def read_quantised(self, name: str) -> Quantised:
        """Read one tensor that has a `format`, in exactly the numbers that `read` gives."""
        info = self.tensors[name]
        return read_blocks(self._raw(info).reshape(*info.shape[:-1], -1), info.kind)

    def _raw(self, info: TensorInfo) -> np.ndarray:
        data = self._parts[info.part][1]
        return np.frombuffer(data, np.uint8, info.size, info.start)

    def _place(self, tensor: GgufTensor, part: int, data_start: int) -> TensorInfo:
        path, data = self._parts[part]
        try:
            kind = GGMLQuantizationType(tensor.kind)
            block_size, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise CheckpointError(
                f"{path}: tensor {tensor.name} has the unknown type {tensor.kind}"
            ) from None
        if not tensor.shape or tensor.shape[-1] % block_size:
            raise CheckpointError(
                f"{path}: tensor {tensor.name} has rows that are not whole blocks"
            )
        start = data_start + tensor.offset
        size = math.prod(tensor.shape) // block_size * block_bytes
        if start + size > len(data):
            raise CheckpointError(
                f"{path} is truncated: tensor {tensor.name} reaches beyond its end"
            )
        return TensorInfo(tensor.shape, kind, part, start, size)
