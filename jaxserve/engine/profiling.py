"""Profiles of a running engine: what host and devices did in some seconds."""

import asyncio
import logging
import math
from pathlib import Path
from typing import Protocol

from jaxserve.core.errors import ConfigError, InvalidRequest

log = logging.getLogger(__name__)

MAX_SECONDS = 60.0  # a profile grows by megabytes per second


class Profiler(Protocol):
    """Records what happens between `start` and `stop`, in the whole process."""

    def start(self, directory: Path) -> None:
        """Begin; the files will be put under `directory`."""
        ...

    def stop(self) -> None:
        """End, and write the files; may take seconds."""
        ...


class ProfileCapture:
    """Takes one profile at a time.

    Args:
        profiler: does it; None if this engine's executor has none.
    """

    def __init__(self, profiler: Profiler | None) -> None:
        self._profiler = profiler
        self._running = False

    async def run(self, seconds: float, directory: Path) -> None:
        """Profile for some seconds, while the engine goes on.

        Args:
            seconds: how long, at most `MAX_SECONDS`.
            directory: where files are put; made if it is not there.

        Raises:
            InvalidRequest: no such length, one is under way, or there is no profiler.
            ConfigError: the directory cannot be made.
        """
        if self._profiler is None:
            raise InvalidRequest("this engine has no profiler")
        if not (math.isfinite(seconds) and 0 < seconds <= MAX_SECONDS):
            raise InvalidRequest(
                f"seconds must be in (0, {MAX_SECONDS:g}], got {seconds}", param="seconds"
            )
        if self._running:
            raise InvalidRequest("a profile is being taken; try again when it is done")
        self._running = True
        log.warning("profiling for %g s into %s", seconds, directory)
        try:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"cannot write profiles to {directory}: {error}") from error
            await asyncio.to_thread(self._profiler.start, directory)
            try:
                await asyncio.sleep(seconds)
            finally:  # also if the caller has gone away
                await asyncio.shield(asyncio.to_thread(self._profiler.stop))
        finally:
            self._running = False
