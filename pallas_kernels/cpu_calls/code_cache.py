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
    (~/.cache/pallas_kernels), or, where others could write to that, one for this process only.
    """
    folder = Path.home() / ".cache" / "pallas_kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        is_private = status.st_uid == os.getuid() and not status.st_mode & (
            stat.S_IWGRP | stat.S_IWOTH
        )
    except OSError:
        is_private = False
    if not is_private:
        folder = Path(tempfile.mkdtemp())
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder / _fingerprint())  # type: ignore[attr-defined]
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before  # type: ignore[attr-defined]


def _fingerprint() -> str:
    digest = hashlib.sha256()
    sources = [*_PACKAGE.glob("cpu_calls/*.py"), *_PACKAGE.glob("*/cpu*.py")]
    for path in sorted(set(sources)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
