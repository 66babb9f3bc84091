"""A file is used only if it is whole and in its own place."""

import os
import threading
from pathlib import Path

import pytest

from jaxserve.files.sealed_files import BrokenSeal, SealedFiles


def test_what_was_written_is_read(tmp_path: Path) -> None:
    files = SealedFiles(tmp_path / "new")
    assert files.read("a") is None
    for content in (b"", b"\n\nlines\n", bytes(range(256)) * 9):
        files.write("a", content)
        assert files.read("a") == content
    assert (tmp_path / "new" / "a").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "does not begin"),
        (lambda data: b"x" + data, "does not begin"),
        (lambda data: data[:-1], "checksum"),
        (lambda data: data + b"x", "checksum"),
        (lambda data: data[:-1] + b"x", "checksum"),
        (lambda data: data.replace(b"a-file", b"b-file"), "b-file in another's place"),
    ],
)
def test_a_file_that_is_not_what_was_written(damage, message: str, tmp_path: Path) -> None:
    files = SealedFiles(tmp_path)
    files.write("a-file", b"content")
    path = tmp_path / "a-file"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BrokenSeal, match=message):
        files.read("a-file")
    files.write("a-file", b"content")
    assert files.read("a-file") == b"content"


def test_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    files, contents = SealedFiles(tmp_path), [bytes([n]) * 100_000 for n in range(8)]
    threads = [threading.Thread(target=files.write, args=("a", c)) for c in contents for _ in "ab"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert files.read("a") in (None, *contents)
    assert files.read("a") in contents
    assert os.listdir(tmp_path) == ["a"]
