"""The header of GGUF files, as the gguf package writes and reads it."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from jaxserve.core.errors import CheckpointError
from jaxserve.files.gguf_header import GgufHeader, map_file, read_gguf_header


def read(path: Path) -> GgufHeader:
    with map_file(path) as data:
        return read_gguf_header(data, path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with values of every kind, and two tensors."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("words", ["a", "", "\u65e5\u672c"])
    writer.add_array("flags", [True, False])
    writer.add_float64("double", 2.5)
    writer.add_int8("small", -3)
    writer.add_uint64("large", 2**40)
    writer.add_string("text", "x" * 1000)
    writer.add_tensor("weight", np.zeros((3, 32), np.float32))
    writer.add_tensor("half", np.zeros((5, 7), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "a.gguf"


def test_it_agrees_with_the_gguf_package(path: Path):
    theirs = gguf.GGUFReader(path)
    expected = {n: f.contents() for n, f in theirs.fields.items() if not n.startswith("GGUF.")}
    ours = read(path)
    metadata = {k: list(v) if isinstance(v, tuple) else v for k, v in ours.metadata.items()}
    assert metadata == expected
    places = [(t.name, t.shape, t.kind, ours.data_start + t.offset) for t in ours.tensors]
    assert places == [
        (t.name, tuple(reversed(t.shape.tolist())), int(t.tensor_type), t.data_offset)
        for t in theirs.tensors
    ]


def test_cut_short(path: Path):
    end = read(path).data_start - 32  # what follows may be padding
    content = path.read_bytes()
    for size in range(0, end, 7):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            read(path)


def test_what_is_no_gguf_file(tmp_path: Path):
    path = tmp_path / "a.gguf"
    for content, message in (
        (b"GGML" + bytes(99), "not begin with GGUF"),
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(99), "version 9"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(99), "big-endian"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        read(tmp_path / "absent.gguf")


@pytest.mark.parametrize("alignment", [0, [32, 32], "32"])
def test_wrong_alignment(tmp_path: Path, alignment):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    add = {int: writer.add_uint32, list: writer.add_array, str: writer.add_string}
    add[type(alignment)]("general.alignment", alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"general\.alignment"):
        read(tmp_path / "a.gguf")
