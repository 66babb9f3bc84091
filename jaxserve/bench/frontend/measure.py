"""Starts a server over a paced engine, and clients, and puts their counts together."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from jaxserve.bench.frontend.client import ClientResult, ClientSpec
from jaxserve.bench.settings import FrontendSpec
from jaxserve.bench.sides import Sides
from jaxserve.bench.tables import Result, format_table
from jaxserve.core.errors import JaxserveError
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.testing.fake_engine import fake_sync_engine
from jaxserve.testing.paced_executor import PacedExecutor

_MAX_MODEL_LEN = 65_536
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontendCost:
    """One transport's figures.

    Attributes:
        transport: "sse" or "grpc".
        client: what the clients counted.
        delivered: tokens that came, of those that the pace asks for.
        steps_per_second: that the engine made.
        server_cpu: cores that the server's process used, its engine included.
        loop_cpu: of these its event loop's thread.
        client_cpu: cores that the clients' process used.
    """

    transport: str
    client: ClientResult
    delivered: float
    steps_per_second: float
    server_cpu: float
    loop_cpu: float
    client_cpu: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontendResult(Result):
    """All transports, without stalled clients and with them, and the engine that serves nobody."""

    spec: FrontendSpec
    steps_per_second_alone: float
    costs: list[FrontendCost]

    def __str__(self) -> str:
        spec, alone = self.spec, self.steps_per_second_alone
        header = ["", "delivered", "steps/s", "slowed", "tokens/msg", "ITL p50 ms", "p99",
                  "server CPU", "its loop", "client CPU", "stalled"]  # fmt: skip
        rows = [
            [
                cost.transport,
                f"{cost.delivered:.1%}",
                f"{cost.steps_per_second:.1f}",
                f"{1 - cost.steps_per_second / alone:.1%}",
                f"{cost.client.num_timed_tokens / max(1, cost.client.num_messages):.2f}",
                f"{cost.client.itl_p50_ms:.1f}",
                f"{cost.client.itl_p99_ms:.1f}",
                f"{cost.server_cpu:.2f}",
                f"{cost.loop_cpu:.2f}",
                f"{cost.client_cpu:.2f}",
                str(cost.client.num_stalled),
            ]
            for cost in self.costs
        ]
        return (
            f"{spec.num_streams} streams, {spec.tokens_per_second:g} tokens/s, "
            f"{spec.steps_per_second:.1f} steps/s; the engine alone makes {alone:.1f}\n\n"
            f"{format_table(header, rows)}"
        )


def measure_front_ends(spec: FrontendSpec, sides: Sides) -> FrontendResult:
    """Serve over every transport, without stalled clients and, if any are wanted, with them."""
    alone = measure_engine_alone(spec)
    cases = [
        (transport, stalled)
        for transport in spec.transports
        for stalled in sorted({0, spec.num_stalled})
    ]

    with _server(spec) as (process, addresses):

        def run(case: tuple[str, int], number: int) -> FrontendCost:
            client = ClientSpec(
                transport=case[0],
                grpc_address=addresses["grpc"],
                http_address=addresses["http"],
                num_streams=spec.num_streams,
                num_connections=spec.num_connections,
                warmup_seconds=spec.warmup_seconds,
                seconds=spec.seconds,
                num_stalled=case[1],
            )
            return measure_front_end(client, process.pid, spec.tokens_per_second)

        costs = sides.take_turns(cases, 1, run)
    return FrontendResult(
        spec=spec, steps_per_second_alone=alone, costs=[costs[case][0] for case in cases]
    )


def measure_engine_alone(spec: FrontendSpec) -> float:
    """Steps per second of the same engine whose tokens go nowhere."""
    engine = fake_sync_engine(
        executor=PacedExecutor(1 / spec.steps_per_second, ord("Z")),
        num_pages=spec.num_streams * _MAX_MODEL_LEN // 64,
        page_size=64,
        max_model_len=_MAX_MODEL_LEN,
        max_num_seqs=spec.num_streams,
        max_num_batched_tokens=max(spec.num_streams, 512),
    )
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=60_000)
    for i in range(spec.num_streams):
        engine.add(str(i), [1, 2, 3], params)
    warm = time.monotonic() + 1.0
    while time.monotonic() < warm:
        engine.step(time.monotonic())
    steps, begun = engine.load().num_steps, time.monotonic()
    while time.monotonic() < begun + spec.seconds / 2:
        engine.step(time.monotonic())
    return (engine.load().num_steps - steps) / (time.monotonic() - begun)


def measure_front_end(spec: ClientSpec, server: int, tokens_per_second: float) -> FrontendCost:
    """What clients get of a running server, and what it costs.

    Args:
        spec: the clients, which are a process of their own.
        server: the process that serves them, and nobody else.
        tokens_per_second: what its engine emits.

    Raises:
        JaxserveError: the clients failed.
    """
    command = [sys.executable, "-m", "jaxserve.bench.frontend.client"]
    command.append(json.dumps(dataclasses.asdict(spec)))
    clients = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    time.sleep(spec.warmup_seconds + 1.0)
    cpu, at = _cpu_seconds(server), time.monotonic()
    time.sleep(spec.seconds / 2)
    used = [b - a for a, b in zip(cpu, _cpu_seconds(server), strict=True)]
    seconds = time.monotonic() - at
    output, _ = clients.communicate(timeout=spec.seconds * 4 + 60)
    if clients.returncode:
        raise JaxserveError(f"the clients failed with exit code {clients.returncode}")
    client = ClientResult(**json.loads(output))
    return FrontendCost(
        transport=spec.transport,
        client=client,
        delivered=client.num_tokens / (tokens_per_second * client.seconds),
        steps_per_second=client.num_steps / client.engine_seconds,
        server_cpu=used[0] / seconds,
        loop_cpu=used[1] / seconds,
        client_cpu=client.cpu_seconds / client.seconds,
    )


@contextlib.contextmanager
def _server(spec: FrontendSpec) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    command = [sys.executable, "-m", "jaxserve.testing.fake_server"]
    command += ["--rows", str(spec.num_streams)]
    command += ["--tokens-per-second", str(spec.tokens_per_second)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            words = process.stdout.readline().split()
            if not words or words[0] != "READY":
                raise JaxserveError("the server did not start")
            named = dict(word.split("=", 1) for word in words[2:])
            yield process, {"grpc": words[1], "http": named["http"]}
        finally:
            process.kill()  # its streams have no end


def _cpu_seconds(pid: int) -> tuple[float, float]:
    """CPU time of a process, and of its main thread (Linux)."""
    return _stat_seconds(Path(f"/proc/{pid}/stat")), _stat_seconds(
        Path(f"/proc/{pid}/task/{pid}/stat")
    )


def _stat_seconds(path: Path) -> float:
    fields = path.read_text().rpartition(")")[2].split()  # the name before may have spaces
    return (int(fields[11]) + int(fields[12])) / _TICKS
