"""How long `jaxserve serve` takes from process start to READY, and what it compiles on the way."""

import contextlib
import dataclasses
import datetime
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxserve.bench.settings import StartupSpec
from jaxserve.bench.tables import Result
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import JaxserveError

PERCENTILES = (10, 25, 50, 75, 90, 99)
STOP_SECONDS = 30.0
_COMPILED = re.compile(r"^READY\b.*\bprograms_compiled=(\d+)")


@dataclasses.dataclass(frozen=True)
class StageTime:
    """A stage of a start.

    Attributes:
        took: seconds; what threads took together, for the stages of single programs.
        done_at: seconds after the process began.
    """

    took: float
    done_at: float


@dataclasses.dataclass(frozen=True)
class Startup:
    """One start.

    Attributes:
        seconds: from process start to READY.
        programs_compiled: XLA programs, on the way there.
        stages: what it went through, by name in order; stages may overlap.
    """

    seconds: float
    programs_compiled: int
    stages: Mapping[str, StageTime] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartupResult(Result):
    """What `vllm bench startup` writes, plus stages and programs compiled; None: no such starts.

    Attributes:
        cold_stages, warm_stages: means over the starts, by name in order.
    """

    avg_cold_startup_time: float
    cold_startup_times: list[float]
    cold_startup_percentiles: dict[str, float]
    cold_programs_compiled: list[int]
    cold_stages: dict[str, StageTime]
    avg_warm_startup_time: float | None = None
    warm_startup_times: list[float] | None = None
    warm_startup_percentiles: dict[str, float] | None = None
    warm_programs_compiled: list[int] | None = None
    warm_stages: dict[str, StageTime] | None = None

    @classmethod
    def of(cls, cold: Sequence[Startup], warm: Sequence[Startup]) -> "StartupResult":
        """The figures of some cold starts, and of warm ones if there were any."""
        fields: dict[str, Any] = {}
        for phase, starts in (("cold", cold), ("warm", warm)):
            if not starts:
                continue
            seconds = np.array([start.seconds for start in starts])
            fields[f"avg_{phase}_startup_time"] = float(seconds.mean())
            fields[f"{phase}_startup_times"] = seconds.tolist()
            fields[f"{phase}_startup_percentiles"] = {
                str(p): float(np.percentile(seconds, p)) for p in PERCENTILES
            }
            fields[f"{phase}_programs_compiled"] = [start.programs_compiled for start in starts]
            fields[f"{phase}_stages"] = {
                name: StageTime(
                    *np.mean(
                        [dataclasses.astuple(s.stages[name]) for s in starts if name in s.stages],
                        axis=0,
                    ).tolist()
                )
                for name in starts[-1].stages
            }
        return cls(**fields)

    def __str__(self) -> str:
        lines = ["=" * 60, "STARTUP TIME BENCHMARK RESULTS", "=" * 60]
        fields = vars(self)
        for phase in ("cold", "warm"):
            if fields[f"avg_{phase}_startup_time"] is None:
                continue
            compiled = ", ".join(map(str, fields[f"{phase}_programs_compiled"]))
            lines += [
                f"\n{phase.upper()} STARTUP:",
                f"Avg startup time: {fields[f'avg_{phase}_startup_time']:.2f} seconds",
                f"Programs compiled: {compiled}",
                "Startup time percentiles:",
                *(f"  {p}%: {v:.2f} seconds"
                  for p, v in fields[f"{phase}_startup_percentiles"].items()),
                *(f"  {name:<20} took {each.took:6.2f} s, done at {each.done_at:6.2f} s"
                  for name, each in fields[f"{phase}_stages"].items()),
            ]  # fmt: skip
        return "\n".join([*lines, "=" * 60])


def serve_command(config: EngineConfig, cache_dir: Path) -> list[str]:
    """The command line that serves `config` on a free port with a compilation cache of its own."""
    command = [sys.executable, "-c", "from jaxserve.cli.main import main; main()"]
    command += ["serve", config.model, "--port", "0", "--http-port", "0", "--log-format", "json"]
    command += ["--log-level", "info", "--compilation-cache-dir", str(cache_dir)]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("model", "compilation_cache_dir") or value == field.default:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", str(value)]
    return command


def measure_startup(command: Sequence[str], *, timeout: float) -> Startup:
    """Start a server, wait for its READY line, and stop it with SIGTERM.

    Args:
        command: the server's command line; its standard output is read for the line.
        timeout: seconds until READY, at most.

    Raises:
        JaxserveError: it ended, or the time passed, before READY (with the end of its log).
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        start, began = time.perf_counter(), time.time()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        with _stopped_at_the_end(process, timeout) as lines:
            for line in lines:
                if match := _COMPILED.match(line):
                    seconds = time.perf_counter() - start
                    log.seek(0)
                    return Startup(seconds, int(match[1]), _stages(log, began))
        log.seek(0)
        tail = "".join(log.readlines()[-10:]).strip()
        raise JaxserveError(f"the server did not become READY within {timeout:g} s:\n{tail}")


def _stages(log: Iterable[str], began: float) -> dict[str, StageTime]:
    """The stages that a server's log tells of; `began` is when its process did, in Unix time."""
    stages = {}
    for line in log:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # not all lines are of stages
            fields = json.loads(line)
            at = datetime.datetime.fromisoformat(fields["time"]).timestamp()
            stages[fields["stage"]] = StageTime(fields["seconds"], at - began)
    return stages


@contextlib.contextmanager
def _stopped_at_the_end(process: subprocess.Popen, timeout: float) -> Iterator[Iterator[str]]:
    """The process' output lines; killed after `timeout`, terminated when the block ends."""
    watchdog = threading.Timer(timeout, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        with process.stdout as lines:
            yield lines
            watchdog.cancel()
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()


def run_startups(config: EngineConfig, spec: StartupSpec, *, progress: bool) -> StartupResult:
    """Cold starts, each with an empty compilation cache, then warm ones with the last one's.

    Raises:
        JaxserveError: the server does not start.
    """
    starts: list[Startup] = []
    with (
        tempfile.TemporaryDirectory(prefix="jaxserve-startup-") as base,
        tqdm(total=spec.num_cold + spec.num_warm, unit="start", disable=not progress) as bar,
    ):
        for index in range(spec.num_cold + spec.num_warm):
            bar.set_description("cold" if index < spec.num_cold else "warm")
            cache_dir = Path(base) / str(min(index, spec.num_cold - 1))
            starts.append(measure_startup(serve_command(config, cache_dir), timeout=spec.timeout))
            bar.update()
    return StartupResult.of(starts[: spec.num_cold], starts[spec.num_cold :])
