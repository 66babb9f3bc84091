"""Reads the header of a GGUF file: its metadata, and where its tensors lie.

The `gguf` package's own reader makes several numpy views of every string, which takes ten
seconds for a vocabulary of 262,144 tokens; this takes a third of one. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from jaxserve.core.errors import CheckpointError

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_U64, _U32_U64 = struct.Struct("<Q"), struct.Struct("<IQ")
_DEFAULT_ALIGNMENT = 32  # bytes
_VERSIONS = (2, 3)
_MAX_DIMS = 4  # ggml's


class GgufTensor(NamedTuple):
    """A tensor as the header lists it.

    Attributes:
        name: its name.
        shape: sizes in row-major order.
        kind: ggml's number of its (quantisation) type.
        offset: bytes from the start of the tensor data.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class GgufHeader(NamedTuple):
    """All that precedes the tensor data.

    Attributes:
        metadata: key -> number, str, list[str], or tuple of numbers.
        tensors: in the file's order.
        data_start: where the tensor data begins, in bytes.
    """

    metadata: dict[str, Any]
    tensors: list[GgufTensor]
    data_start: int


def map_file(path: Path) -> mmap.mmap:
    """The file's bytes, read when they are touched.

    Raises:
        CheckpointError: there is no such file, or it is empty.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # mmap refuses an empty file by ValueError
        raise CheckpointError(f"cannot read {path}: {error}") from error


def read_gguf_header(data: mmap.mmap, path: Path) -> GgufHeader:
    """Take the header of a mapped file apart.

    Args:
        data: the file's bytes.
        path: the file's name, for messages.

    Raises:
        CheckpointError: not GGUF version 2 or 3, cut short, or not UTF-8 where it must be.
    """
    try:
        return _Reader(data).header()
    except (ValueError, struct.error, OverflowError, MemoryError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or not a GGUF file: {error}") from error


class _Reader:
    """A position in the file, and how to read each kind of value there."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def header(self) -> GgufHeader:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._scalar("I")
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            raise ValueError(
                "it is big-endian, which is not supported; the gguf package's "
                "gguf_convert_endian.py turns it around"
            )
        if version not in _VERSIONS:
            raise ValueError(f"version {version} is not supported, only 2 and 3 are")
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        metadata = {self._strings(1)[0]: self._value(self._scalar("I")) for _ in range(num_keys)}
        tensors = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError("general.alignment is not a positive number")
        return GgufHeader(metadata, tensors, -(-self._at // alignment) * alignment)

    def _tensor(self) -> GgufTensor:
        name = self._strings(1)[0]
        num_dims = self._scalar("I")
        if num_dims > _MAX_DIMS:
            raise ValueError(f"tensor {name[:60]} has {num_dims} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(num_dims))[::-1]
        return GgufTensor(name, shape, self._scalar("I"), self._scalar("Q"))

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._strings(1)[0]
        if kind != _ARRAY:
            return self._scalar(self._code(kind))
        kind, count = _U32_U64.unpack_from(self._data, self._at)
        self._at += _U32_U64.size
        if kind == _STRING:
            return self._strings(count)
        if kind == _ARRAY:
            return [self._value(_ARRAY) for _ in range(count)]
        code = f"<{count}{self._code(kind)}"
        values = struct.unpack_from(code, self._data, self._at)
        self._at += struct.calcsize(code)
        return values

    def _strings(self, count: int) -> list[str]:
        """`count` strings in a row, each a 64-bit length and that many bytes."""
        data, at, end = self._data, self._at, len(self._data)
        length_of = _U64.unpack_from
        strings = []
        for _ in range(count):
            start = at + 8
            at = start + length_of(data, at)[0]
            if at > end:
                raise ValueError("a string reaches beyond the end of the file")
            strings.append(data[start:at].decode())
        self._at = at
        return strings

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"metadata of unknown type {kind}")
        return _SCALARS[kind]
