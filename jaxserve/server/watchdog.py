"""Notices that a step does not end."""

import asyncio

from jaxserve.core.errors import StepHung
from jaxserve.engine.async_engine import AsyncEngine

LEAST_SECONDS = 300.0  # a first step may wait for memory that was swapped out, or a slow disk
TIMES_LONGEST = 20.0
_PERIOD = 0.5  # seconds between two looks


class StepWatchdog:
    """Watches an engine's steps.

    Only time in which the watchdog itself got to run counts: a process that was stopped, or a
    laptop that slept, has no step that hangs.

    Args:
        engine: whose.
        timeout: seconds that a step may take; None for 20 times as long as the longest step so
            far, and at least five minutes.
    """

    def __init__(self, engine: AsyncEngine, timeout: float | None = None) -> None:
        self._engine = engine
        self._timeout = timeout
        self._turn: int | None = None
        self._stood = 0.0

    @property
    def limit(self) -> float:
        """Seconds that a step may take now."""
        if self._timeout is not None:
            return self._timeout
        return max(LEAST_SECONDS, TIMES_LONGEST * self._engine.pulse.longest)

    def look(self, seconds: float) -> float | None:
        """How long the step under way has taken, if that is too long.

        Args:
            seconds: since the last look.
        """
        turn = self._engine.pulse.turn
        self._stood = self._stood + seconds if turn is not None and turn == self._turn else 0.0
        self._turn = turn
        return self._stood if self._stood > self.limit else None

    async def watch(self) -> None:
        """Watch until the engine takes no more requests.

        Raises:
            StepHung: a step does not end; all requests have been told so.
        """
        loop = asyncio.get_running_loop()
        period = min(_PERIOD, self.limit / 4)
        before = loop.time()
        while self._engine.is_ready:
            await asyncio.sleep(period)
            now = loop.time()
            stood = self.look(min(now - before, 2 * period))
            before = now
            if stood is not None:
                error = StepHung(
                    f"a step has not ended within {stood:.1f} s (--step-timeout): the device, or "
                    "what it waits for, hangs; the server ends"
                )
                self._engine.fail(error)
                raise error
