"""Where Numba keeps the machine code of custom calls from one process to the next."""

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numba

_PACKAGE = Path(__file__).parents[1]


@contextlib.contextmanager
def code_cache() -> Iterator[None]:
    """Functions that are defined meanwhile with `cache=True` are kept in a folder of their sources.

    Numba by itself looks at the file of a function only, and would go on using what was inlined
    from others after those have changed. Its files are pickles, so the folder is the user's own
    (`$XDG_CACHE_HOME/pallas_kernels`, or under `~/.cache`), or, where others could write to that,
    one that is gone afterwards.
    """
    with contextlib.ExitStack() as stack:
        folder = _cache_home() / "pallas_kernels"
        if not _is_private(folder):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        before = numba.config.CACHE_DIR  # type: ignore[attr-defined]
        numba.config.CACHE_DIR = str(folder / _fingerprint())  # type: ignore[attr-defined]
        try:
            yield
        finally:
            numba.config.CACHE_DIR = before  # type: ignore[attr-defined]


def _cache_home() -> Path:
    """As the XDG base directory specification has it: a path that is not absolute is ignored."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return base if base.is_absolute() else Path.home() / ".cache"


def _is_private(folder: Path) -> bool:
    """Whether the folder, made if need be, is one where only this user can put files."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _fingerprint() -> str:
    digest = hashlib.sha256()
    sources = [*_PACKAGE.glob("cpu_calls/*.py"), *_PACKAGE.glob("*/cpu*.py")]
    for path in sorted(sources):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
