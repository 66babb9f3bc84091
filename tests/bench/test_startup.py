"""`bench startup` against little programs that pretend to be the server."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from jaxserve.bench import startup
from jaxserve.bench.settings import StartupSpec
from jaxserve.bench.startup import (
    StageTime,
    Startup,
    StartupResult,
    measure_startup,
    serve_command,
)
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import JaxserveError

SERVER = """
import signal, sys, time, pathlib
def stop(*_):
    pathlib.Path(sys.argv[1]).write_text("terminated")
    sys.exit()
signal.signal(signal.SIGTERM, stop)
print("loading", flush=True)
print("no JSON", file=sys.stderr)
print('{"time": "2026-01-01T00:00:01+00:00", "message": "no stage"}', file=sys.stderr)
print('{"time": "2026-01-01T00:00:07+00:00", "stage": "weights", "seconds": 2.5}', file=sys.stderr)
time.sleep(0.3)
print("READY 127.0.0.1:1234 model=m seconds=0.3 programs_compiled=17", flush=True)
time.sleep(60)
"""

STAGES = {"weights": StageTime(2.0, 3.0)}


def test_ready_is_timed_and_the_server_stopped(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    started = measure_startup([sys.executable, "-c", SERVER, str(flag)], timeout=30)
    assert started.programs_compiled == 17
    assert 0.3 <= started.seconds < 20
    assert flag.read_text() == "terminated"
    assert list(started.stages) == ["weights"] and started.stages["weights"].took == 2.5


def test_a_server_that_fails_shows_its_log() -> None:
    program = "import sys; print('READ'); sys.exit('no such model')"
    with pytest.raises(JaxserveError, match="no such model"):
        measure_startup([sys.executable, "-c", program], timeout=30)


def test_a_server_that_hangs_is_killed() -> None:
    with pytest.raises(JaxserveError, match=r"within 0\.2 s"):
        measure_startup([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2)


def test_the_command_line_carries_the_options_that_were_set(tmp_path: Path) -> None:
    config = EngineConfig(model="some/model", random_weights=True, overlap=False, num_pages=7)
    command = serve_command(config, tmp_path)
    assert command[3:] == [
        "serve", "some/model", "--port", "0", "--http-port", "0", "--log-format", "json",
        "--log-level", "info", "--compilation-cache-dir", str(tmp_path),
        "--random-weights", "--num-pages", "7", "--no-overlap",
    ]  # fmt: skip


def test_warm_starts_use_the_last_cold_ones_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()

    def fake(command: list[str], *, timeout: float) -> Startup:
        cache = command[command.index("--compilation-cache-dir") + 1]
        known = cache in seen
        seen.add(cache)
        return Startup(1.0, 0) if known else Startup(9.0, 5, STAGES)

    monkeypatch.setattr(startup, "measure_startup", fake)
    spec = StartupSpec(num_iters_cold=2, num_iters_warm=3, timeout=1)
    result = startup.run_startups(EngineConfig(), spec, progress=False)
    assert result == StartupResult.of([Startup(9.0, 5, STAGES)] * 2, [Startup(1.0, 0)] * 3)
    assert result.avg_cold_startup_time == 9 and result.warm_programs_compiled == [0, 0, 0]
    fields = json.loads(json.dumps(dataclasses.asdict(result)))
    assert fields["cold_stages"] == {"weights": {"took": 2.0, "done_at": 3.0}}
    text = str(result)
    assert "weights              took   2.00 s, done at   3.00 s" in text
    assert "Avg startup time: 9.00 seconds\nPrograms compiled: 5, 5" in text
    assert "WARM STARTUP:\nAvg startup time: 1.00 seconds\nPrograms compiled: 0, 0, 0" in text
