"""Only what nobody else could have written is trusted."""

import os
from pathlib import Path

import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.files.private_files import require_private, require_private_file


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_a_directory_of_ones_own_is_trusted(tmp_path: Path, mode: int) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    require_private(tmp_path / "cache")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_one_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod go-w {tmp_path / 'cache'}"):
        require_private(tmp_path / "cache")


def test_nor_may_others_replace_it(tmp_path: Path) -> None:
    (tmp_path / "open" / "cache").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "open" / "cache")
    (tmp_path / "open").chmod(0o777)
    for path in (tmp_path / "open" / "cache", tmp_path / "link"):
        with pytest.raises(ConfigError, match=f"others may write to {tmp_path / 'open'}"):
            require_private(path)
    (tmp_path / "open").chmod(0o1777)
    require_private(tmp_path / "link")


def test_one_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch(0o600)
    os.chown(file, os.getuid(), os.getgid())
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 4321)
    if os.getuid() == 0:  # root is trusted by everybody: give it to a third one
        os.chown(tmp_path, 12345, -1)
        os.chown(file, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user"):
        require_private(tmp_path)
    with file.open("rb") as opened, pytest.raises(PermissionError):
        require_private_file(opened)


def test_a_missing_one_passes(tmp_path: Path) -> None:
    require_private(tmp_path / "none")
