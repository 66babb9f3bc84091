"""XLA's side of a custom call, in hand: whether and when its threads come is up to the test."""

import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any

from pallas_kernels.cpu_calls import handler

Task = Callable[[], object]
_TASK = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)


@dataclasses.dataclass
class FakeXla:
    """Calls handlers whose items find `argument` at the frame's context.

    Attributes:
        num_threads: of the pool.
        tasks: what its threads were given, none of which has begun.
        jobs: the jobs that these are for, in the same order.
    """

    num_threads: int
    tasks: list[Task] = dataclasses.field(default_factory=list)
    jobs: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._api = (ctypes.c_int64 * handler._API_WORDS)()
        # Kept: the handler has their addresses.
        self._functions = (_TASK(self._schedule), _TASK(self._tell_threads))
        for word, function in zip(
            (handler._SCHEDULE, handler._NUM_THREADS), self._functions, strict=True
        ):
            self._api[word] = ctypes.cast(function, ctypes.c_void_p).value or 0

    def call(self, handle: Any, argument: int) -> None:
        """One custom call, on this thread, to its end."""
        frame = (ctypes.c_int64 * handler._FRAME_WORDS)()
        frame[handler._API] = ctypes.addressof(self._api)
        frame[handler._CONTEXT] = argument
        assert handle(ctypes.addressof(frame)) == 0

    def _schedule(self, order: int) -> int:
        _, _, _, task, job = (ctypes.c_int64 * 5).from_address(order)
        self.tasks.append(lambda: _TASK(task)(job))
        self.jobs.append(job)
        return 0

    def _tell_threads(self, question: int) -> int:
        fields = (ctypes.c_int64 * 5).from_address(question)
        ctypes.c_int64.from_address(fields[3]).value = self.num_threads
        return 0
