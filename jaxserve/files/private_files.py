"""Whether files are this user's alone: asked before anything in them is trusted."""

import os
import stat
from pathlib import Path
from typing import IO

from jaxserve.core.errors import ConfigError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def require_private(directory: Path, *, because: str = "what is kept there is run as code") -> None:
    """Refuse a directory into which anybody but this user and root could put a file.

    The directory must belong to one of them and be writable by its owner only. So that nobody
    can put another in its place, each directory above it must belong to one of them too, and be
    writable by everybody only if it is sticky, as /tmp is. One that is not there passes.

    Args:
        directory: where something is kept that must be this user's own.
        because: why, for the message.

    Raises:
        ConfigError: the message says which directory, and what to do.
    """
    path = directory.resolve()
    if not path.is_dir():
        return
    for folder in (path, *path.parents):
        status = folder.stat()
        if status.st_uid not in (os.geteuid(), 0):
            raise ConfigError(
                f"{directory} cannot be trusted: {folder} belongs to user {status.st_uid}, and "
                f"{because}; name a directory of your own"
            )
        is_loose = status.st_mode & (_OTHERS_WRITE if folder == path else stat.S_IWOTH)
        is_sticky = folder != path and status.st_mode & stat.S_ISVTX
        if is_loose and not is_sticky:
            raise ConfigError(
                f"{directory} cannot be trusted: others may write to {folder}, and {because}; "
                f"run chmod go-w {folder}, or name another directory"
            )


def require_private_file(file: IO[bytes]) -> None:
    """Refuse an open file that anybody but this user and root could have written.

    Raises:
        PermissionError: it belongs to somebody else, or others may write to it.
    """
    status = os.fstat(file.fileno())
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & _OTHERS_WRITE:
        raise PermissionError("others than this user may write to it")


def is_readable_by_others(path: Path) -> bool:
    """Whether users other than a file's owner may read it."""
    return bool(path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))
