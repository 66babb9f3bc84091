"""Reads the metadata of a GGUF file.

The `gguf` package makes several numpy views of every string, which takes ten seconds for a
vocabulary of 262,144 tokens; this takes a third of one. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from pathlib import Path
from typing import Any

from jaxserve.core.errors import CheckpointError

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_U64, _U32_U64 = struct.Struct("<Q"), struct.Struct("<IQ")


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """All key-value pairs: numbers, str, list[str], or tuples of numbers.

    Raises:
        CheckpointError: the file is missing, not GGUF version 2 or 3, cut short, or not
            UTF-8 where it must be.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, path).metadata()
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"cannot read {path} as GGUF: {error}") from error


class _Reader:
    """A position in the file, and how to read each kind of value there."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._at = 0
        self._path = path

    def metadata(self) -> dict[str, Any]:
        if self._data[:4] != b"GGUF":
            raise CheckpointError(f"{self._path} is not a GGUF file")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise CheckpointError(f"{self._path} is GGUF version {version}; 2 and 3 are known")
        self._scalar("Q")  # the number of tensors
        count = self._scalar("Q")
        return {self._strings(1)[0]: self._value(self._scalar("I")) for _ in range(count)}

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
                raise CheckpointError(f"{self._path} is cut short inside of its metadata")
            strings.append(data[start:at].decode())
        self._at = at
        return strings

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise CheckpointError(f"{self._path} has metadata of unknown type {kind}")
        return _SCALARS[kind]
