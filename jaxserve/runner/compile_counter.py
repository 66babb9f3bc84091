"""Counts XLA compilations, and tells those of start-up from those that must not happen."""

import contextlib
import logging
import threading
from collections.abc import Iterator

from jaxserve.core.errors import CompileAfterReady

log = logging.getLogger(__name__)


class CompileCounter:
    """How many programs XLA compiled before and after the engine said READY.

    Those that a start has put off (`--ready first`) are no surprise, and counted apart.

    Args:
        strict: after `ready()`, raise CompileAfterReady instead of counting. Tests set it;
            in production a surprise compile is slow but must not take the server down.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self._lock = threading.Lock()
        self._ready = False
        self._plan = threading.local()
        self.before_ready = 0
        self.after_ready = 0
        self.by_plan = 0

    @property
    def is_ready(self) -> bool:
        """Whether `ready()` was called."""
        return self._ready

    def ready(self) -> None:
        """From now on every compilation is a surprise."""
        self._ready = True

    @contextlib.contextmanager
    def planned(self) -> Iterator[None]:
        """What this thread compiles meanwhile was put off to after READY by plan."""
        self._plan.is_here = True
        try:
            yield
        finally:
            self._plan.is_here = False

    @property
    def is_planned(self) -> bool:
        """Whether this thread compiles by plan."""
        return getattr(self._plan, "is_here", False)

    def compiled(self, name: str) -> None:
        """Note that a program called `name` was compiled.

        Raises:
            CompileAfterReady: strict, and `ready()` was called before.
        """
        with self._lock:
            if self.is_planned:
                self.by_plan += 1
                return
            if not self._ready:
                self.before_ready += 1
                return
            self.after_ready += 1
        if self._strict:
            raise CompileAfterReady(f"{name} was compiled after READY")
        log.warning("compiled %s after READY; a shape escaped the buckets", name)
