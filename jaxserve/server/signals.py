"""SIGTERM and SIGINT: the first one asks for an end, the second one has it at once."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading

log = logging.getLogger(__name__)

NUMBERS = (signal.SIGTERM, signal.SIGINT)
HARD_STOP_SECONDS = 5.0  # from the second signal until the process ends, whatever hangs


class Signals:
    """Counts SIGTERM and SIGINT while entered, and lets coroutines be cut short by them.

    A thread of its own reads them, so that a second signal ends the process even where the event
    loop hangs. Outside the main thread, which alone may catch signals, only `trigger` counts.

    Attributes:
        count: how many came.
    """

    def __init__(self) -> None:
        self.count = 0
        self._last: int = signal.SIGTERM
        self._first = asyncio.Event()
        self._second = asyncio.Event()
        self._ended = threading.Event()
        self._left = contextlib.ExitStack()

    @property
    def status(self) -> int:
        """The exit status of a process that the last signal ended, as shells have it."""
        return 128 + self._last

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._catch(asyncio.get_running_loop())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._left.close()

    def trigger(self, number: int = signal.SIGTERM) -> None:
        """Do what a signal does; on the event loop."""
        self.count += 1
        self._last = number
        (self._first if self.count == 1 else self._second).set()

    async def unless_first(self, work: asyncio.Future) -> bool:
        """Wait for `work`; False (and `work` cancelled) if the first signal came before."""
        return await self._unless(self._first, work)

    async def unless_second(self, work: asyncio.Future) -> bool:
        """Wait for `work`; False (and `work` cancelled) if a second signal came before."""
        return await self._unless(self._second, work)

    async def _unless(self, event: asyncio.Event, work: asyncio.Future) -> bool:
        waiter = asyncio.ensure_future(event.wait())
        try:
            await asyncio.wait((waiter, work), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()
        if work.done():
            await work
            return True
        work.cancel()
        return False

    def _catch(self, loop: asyncio.AbstractEventLoop) -> None:
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        thread = threading.Thread(target=self._read, args=(reader, loop), daemon=True)
        self._left.callback(thread.join)
        self._left.callback(writer.close)  # which ends the thread
        # A handler in C writes the signal's number there, whatever Python is doing.
        self._left.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer.fileno()))
        for number in NUMBERS:
            self._left.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        thread.start()

    def _read(self, reader: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        count = 0
        with reader:
            while number := reader.recv(1):
                if number[0] not in NUMBERS:
                    continue
                count += 1
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(self.trigger, number[0])
                if count > 1 and not self._ended.wait(HARD_STOP_SECONDS):
                    log.critical("something hangs: the process ends at once")
                    logging.shutdown()
                    os._exit(128 + number[0])
