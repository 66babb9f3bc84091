"""Files whose content is taken anew when they change."""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from jaxserve.core.errors import ConfigError

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0

T = TypeVar("T")


class _Version(NamedTuple):
    """What tells one state of a file from another."""

    modified_ns: int
    changed_ns: int  # also when others may read it than before
    size: int
    inode: int


class WatchedFiles(Generic[T]):
    """What some files say, read again when one of them changes; for any number of threads.

    They are looked at when asked for, at most once a second. A change that cannot be read keeps
    what was there, with one line in the log.

    Args:
        paths: the files.
        load: reads them all; raises `ConfigError` if something is wrong with them.
        name: what they are, for the log: "the API keys".
        now: seconds, on any monotonic clock.

    Raises:
        ConfigError: from `load`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        load: Callable[[], T],
        name: str,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = tuple(paths)
        self._load = load
        self._name = name
        self._now = now
        self._lock = threading.Lock()
        self._looked_at = now()
        self._versions = self._look()
        self._value = load()

    def get(self) -> T:
        """What the files say."""
        with self._lock:
            now = self._now()
            if now - self._looked_at >= _POLL_SECONDS:
                self._looked_at = now
                self._reload_if_changed()
            return self._value

    def _reload_if_changed(self) -> None:
        versions = self._look()
        if versions == self._versions:
            return
        self._versions = versions  # so a broken change is complained about once
        try:
            self._value = self._load()
        except ConfigError as error:
            log.error("keeping %s as they were: %s", self._name, error)
        else:
            log.warning("read %s again", self._name)

    def _look(self) -> tuple[_Version | None, ...]:
        """The state of each file; None of one that cannot be seen."""
        return tuple(_version_of(path) for path in self._paths)


def _version_of(path: Path) -> _Version | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return _Version(status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
