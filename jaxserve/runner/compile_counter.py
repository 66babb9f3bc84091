"""Counts XLA compilations, and tells those of start-up from those that must not happen."""

import logging
import threading

from jaxserve.core.errors import CompileAfterReady

log = logging.getLogger(__name__)


class CompileCounter:
    """How many programs XLA compiled before and after the engine said READY.

    Args:
        strict: after `ready()`, raise CompileAfterReady instead of counting. Tests set it;
            in production a surprise compile is slow but must not take the server down.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self._lock = threading.Lock()
        self._ready = False
        self.before_ready = 0
        self.after_ready = 0

    @property
    def is_ready(self) -> bool:
        """Whether `ready()` was called."""
        return self._ready

    def ready(self) -> None:
        """From now on every compilation is a surprise."""
        self._ready = True

    def compiled(self, name: str) -> None:
        """Note that a program called `name` was compiled.

        Raises:
            CompileAfterReady: strict, and `ready()` was called before.
        """
        with self._lock:
            if not self._ready:
                self.before_ready += 1
                return
            self.after_ready += 1
        if self._strict:
            raise CompileAfterReady(f"{name} was compiled after READY")
        log.warning("compiled %s after READY; a shape escaped the buckets", name)
