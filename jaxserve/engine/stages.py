"""What a start does, and how long it takes: a log line per stage, a bar on a terminal."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

log = logging.getLogger(__name__)

LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"  # as all commands' log lines
_SECONDS_BETWEEN = 10.0  # log lines of a stage that takes long


@contextlib.contextmanager
def stage(name: str, done: str) -> Iterator[None]:
    """Time what is done meanwhile, and log that it is done.

    Args:
        name: of the stage, for machines (`jaxserve bench startup`).
        done: what has been achieved, for people.
    """
    started = time.monotonic()
    yield
    stage_done(name, done, time.monotonic() - started)


def stage_done(name: str, done: str, seconds: float) -> None:
    """Log that a stage is done; see `stage`."""
    log.info("%s", done, extra={"stage": name, "seconds": round(seconds, 3)})


@contextlib.contextmanager
def told_on_stderr() -> Iterator[None]:
    """Have stages told on stderr meanwhile, where a script would wait in silence.

    That is where stderr is no terminal, which has bars, and nobody has set up logging: whoever
    has handlers, or a level for jaxserve's loggers, has said what to see.
    """
    is_set_up = log.hasHandlers() or logging.getLogger("jaxserve").level != logging.NOTSET
    if sys.stderr.isatty() or is_set_up:
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(LINE))
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


@contextlib.contextmanager
def counting(describe: Callable[[], str], *, bar: bool) -> Iterator[Callable[[int, int], None]]:
    """Show how far a stage of many parts is: a bar on a terminal, else a log line now and then.

    Args:
        describe: says what is being done, whenever it is shown; called from another thread, too.
        bar: whether there may be a bar.

    Returns:
        Takes how many parts are done, and how many there are.
    """
    counts = (0, 0)
    over = threading.Event()
    with tqdm(desc=describe(), disable=None if bar else True) as display:

        def show(done: int, total: int) -> None:
            nonlocal counts
            counts = display.n, display.total = done, total
            display.set_description(describe())

        def go_on() -> None:
            seconds = _SECONDS_BETWEEN if display.disable else 1.0
            while not over.wait(seconds):
                if display.disable:
                    log.info("%s", _so_far(describe(), *counts))
                else:
                    display.set_description(describe())

        # Parts may come late, and a caller that waits for the first says nothing.
        ticking = threading.Thread(target=go_on, name="stage", daemon=True)
        ticking.start()
        try:
            yield show
        finally:
            over.set()
            ticking.join()


def _so_far(what: str, done: int, total: int) -> str:
    return f"{what}: {done} of {total}" if done else what
