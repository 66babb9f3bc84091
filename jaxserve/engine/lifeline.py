"""Whether an engine may go on: one thread at a time steps or closes it, and a failure is final."""

import contextlib
import threading
from collections.abc import Iterator

from jaxserve.core.at_exit import hold_at_exit
from jaxserve.core.errors import EngineDead


class Lifeline:
    """Guards an engine's steps.

    A step that fails half-way leaves what was planned undone, in the scheduler and on the device,
    so there is none after it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._failure: BaseException | None = None
        self._is_closed = False
        self._is_held = False

    @property
    def has_failed(self) -> bool:
        """Whether a step has failed."""
        return self._failure is not None

    @property
    def is_open(self) -> bool:
        """Whether it is not closed, and not about to be as the interpreter ends."""
        return not (self._is_closed or self._is_held)

    def check(self) -> None:
        """Say whether the engine still serves.

        Raises:
            EngineDead: a step has failed, or the engine is closed.
        """
        if self._is_held:
            with self._lock:  # as the interpreter ends, other threads than its own get no further
                pass
        if self._failure is not None:
            name = type(self._failure).__name__
            raise EngineDead(
                f"a step of the engine has failed ({name}: {self._failure}), so it serves no "
                "more; a new one has to be made"
            ) from self._failure
        if self._is_closed:
            raise EngineDead("the engine is closed")

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a step; what it raises is the engine's failure.

        Raises:
            EngineDead: see `check`.
        """
        with self._lock:
            self.check()
            try:
                yield
            except BaseException as error:
                self._failure = error
                raise

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Around what must not happen during a step, or while another thread closes the engine."""
        with self._lock:
            yield

    @contextlib.contextmanager
    def close(self) -> Iterator[bool]:
        """Around what closes the engine, after the step under way; whether it is the first."""
        with self._lock:
            is_first, self._is_closed = not self._is_closed, True
            yield is_first

    def hold(self) -> None:
        """Let no other thread step from now on: it waits until the process ends."""
        self._is_held = True
        hold_at_exit(self._lock, "a step")
