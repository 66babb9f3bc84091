"""`scripts/compile_ahead.py` names every program of a server, and says what the step takes."""

import re
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "compile_ahead.py"

pytestmark = pytest.mark.slow


def test_what_a_server_would_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("libtpu", reason="needs libtpu, TPUs' compiler")
    arguments = "smollm2-135m v5e:2x2 --layers 2 --num-spans 2 --quantization int8 --num-pages 64"
    only = ["--only", "^(embed|span-0)-8$"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments.split(), *only])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    first, *programs, total, memory = capsys.readouterr().out.splitlines()
    # Of 8 token buckets, three programs each; of 5 and of 3 row buckets, and copies of pages.
    assert first == "2 spans, 42 programs"
    names = [line.split()[0] for line in programs]
    assert {*names} == {"embed-8", "span-0-8"}
    assert re.fullmatch(r"\d+ s for 2 programs", total)
    assert re.search(r"weights 0\.0\d, 64 KV pages .* of 16$", memory)
