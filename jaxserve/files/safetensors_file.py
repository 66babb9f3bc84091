"""Maps a safetensors file: its tensors as arrays that are read when they are touched.

The safetensors package reads no float8 into NumPy, and gives a copy of whole tensors, where rows
of a quantised weight are wanted alone. The format: a length of 8 bytes, a JSON object of so many
bytes, the tensors (https://huggingface.co/docs/safetensors).
"""

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.core.errors import CheckpointError
from jaxserve.files.gguf_header import map_file

_LENGTH = 8  # bytes that say how long the header is
_TYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_, "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4",
        "I32": "<i4", "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
        "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}  # fmt: skip


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The file's tensors by name, read-only, none of them read yet.

    Raises:
        CheckpointError: the file cannot be read, is cut short, or holds a type that NumPy has not.
    """
    data = map_file(path)
    start = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    try:
        if len(data) < start:
            raise ValueError("it is shorter than its header says")
        header = json.loads(data[_LENGTH:start])
        header.pop("__metadata__", None)
        return {name: _array(data, start, entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _array(data: Any, start: int, entry: dict[str, Any]) -> np.ndarray:
    kind, shape = _TYPES.get(entry["dtype"]), tuple(entry["shape"])
    if kind is None:
        raise ValueError(f"there is no type {entry['dtype']} in NumPy")
    first, last = entry["data_offsets"]
    count = math.prod(shape)
    whole = all(type(number) is int and number >= 0 for number in (*shape, first, last))
    if not whole or last - first != count * kind.itemsize or start + last > len(data):
        raise ValueError(f"a tensor of {entry} is not in a file of {len(data)} bytes")
    return np.frombuffer(data, kind, count, start + first).reshape(shape)
