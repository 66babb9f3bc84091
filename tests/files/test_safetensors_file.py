"""Mapped safetensors files: every type, and what is wrong with broken ones."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.core.errors import CheckpointError
from jaxserve.files.safetensors_file import map_tensors


@pytest.mark.parametrize(
    "kind",
    ["bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16",
     "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2"],
)  # fmt: skip
def test_reads_what_the_package_writes(tmp_path, kind):
    array = np.arange(1, 7).reshape(2, 3).astype(getattr(ml_dtypes, kind, None) or kind)
    save_file({"a": array, "odd": np.ones(3, np.uint8), "b": array[1:]}, tmp_path / "x")
    found = map_tensors(tmp_path / "x")
    assert set(found) == {"a", "b", "odd"}
    assert found["a"].dtype == array.dtype and not found["a"].flags.writeable
    assert found["a"].tobytes() == array.tobytes()
    assert found["b"].tobytes() == array[1:].tobytes()
    assert found["b"].shape == (1, 3)


def test_scalars_and_empty_tensors(tmp_path):
    save_file({"one": np.array(2.5, np.float32), "none": np.zeros((0, 4))}, tmp_path / "x",
              metadata={"format": "pt"})  # fmt: skip
    found = map_tensors(tmp_path / "x")
    assert found["one"].shape == () and found["one"] == 2.5
    assert found["none"].shape == (0, 4)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "entry",
    [
        {**GOOD, "dtype": "F4"}, {**GOOD, "dtype": []}, {**GOOD, "shape": [3]},
        {**GOOD, "shape": [-2]}, {**GOOD, "shape": 2}, {**GOOD, "shape": [2.0]},
        {**GOOD, "data_offsets": [8, 16]}, {**GOOD, "data_offsets": [-8, 0]},
        {**GOOD, "data_offsets": [0]}, {"dtype": "F32"}, [], None, 5,
    ],
)  # fmt: skip
def test_refuses_broken_entries(tmp_path, entry):
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match="cannot read"):
        map_tensors(tmp_path / "x")


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 20, bytes(8) + b"x", (2).to_bytes(8, "little") + b"[]",
                (1).to_bytes(8, "little") + b"\xff"],
)  # fmt: skip
def test_refuses_other_files(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError):
        map_tensors(tmp_path / "x")
    with pytest.raises(CheckpointError):
        map_tensors(tmp_path / "missing")
