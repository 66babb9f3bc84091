"""What a start does, and how long it takes: a log line per stage, a bar where somebody looks."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

log = logging.getLogger(__name__)

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
def counting(describe: Callable[[], str], *, bar: bool) -> Iterator[Callable[[int, int], None]]:
    """Show how far a stage of many parts is: a bar on a terminal, else a log line now and then.

    Args:
        describe: says what is being done, whenever it is shown.
        bar: whether there may be a bar.

    Returns:
        Takes how many parts are done, and how many there are.
    """
    shown = time.monotonic()
    with tqdm(desc=describe(), delay=1, disable=None if bar else True) as display:

        def show(done: int, total: int) -> None:
            nonlocal shown
            display.total, display.n = total, done
            display.set_description(describe(), refresh=False)
            display.refresh()
            if display.disable and time.monotonic() - shown > _SECONDS_BETWEEN:
                shown = time.monotonic()
                log.info("%s: %d of %d", describe(), done, total)

        yield show
