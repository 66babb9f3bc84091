"""What a start shows of its stages."""

import io
import logging
import sys
import threading

import pytest

from jaxserve.engine import stages


def test_who_waits_is_told_now_and_then_what_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    said = threading.Semaphore(0)

    def info(text: str, *values: object) -> None:
        lines.append(text % values)
        said.release()

    monkeypatch.setattr(stages, "_SECONDS_BETWEEN", 0.001)
    monkeypatch.setattr(stages.log, "info", info)
    with stages.counting(lambda: "at it", bar=False) as show:
        assert said.acquire(timeout=10)  # though nothing is done yet
        show(2, 3)
        while lines[-1] != "at it: 2 of 3":
            assert said.acquire(timeout=10)
    assert lines[0] == "at it"
    assert not [thread for thread in threading.enumerate() if thread.name == "stage"]


def test_a_bar_leaves_the_line_to_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with stages.counting(lambda: "at it", bar=True) as show:
        show(3, 3)
    assert "at it: 100%" in terminal.getvalue() and terminal.getvalue().endswith("\n")


def bare_logging(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """jaxserve's logger as in a process whose logging nobody has set up.

    Not a fixture: pytest adds handlers of its own to what does not propagate before a test runs.
    """
    logger = logging.getLogger("jaxserve")
    monkeypatch.setattr(logger, "propagate", False)
    logger.setLevel(logging.NOTSET)
    return logger


def start() -> None:
    with stages.told_on_stderr(), stages.stage("weights", "weights loaded"):
        pass


def test_scripts_are_told_of_stages_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare_logging(monkeypatch)
    start()
    with stages.stage("more", "more done"):  # after the start nothing is told
        pass
    start()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" INFO ")[2] for line in lines] == [
        "jaxserve.engine.stages: weights loaded", "jaxserve.engine.stages: weights loaded"
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["handler", "level", "terminal"])
def test_who_has_said_what_to_see_is_told_nothing_else(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    logger = bare_logging(monkeypatch)
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    if how == "handler":
        logger.addHandler(logging.NullHandler())
    elif how == "level":
        logger.setLevel(logging.ERROR)
    else:
        monkeypatch.setattr(stderr, "isatty", lambda: True)
    start()
    assert stderr.getvalue() == ""
