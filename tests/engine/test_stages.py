"""What a start shows of its stages."""

import io
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
