"""The clients, in a process of their own: `python -m jaxserve.bench.frontend.client SPEC`.

SPEC is a `ClientSpec` as JSON; a `ClientResult` comes out as JSON.
"""

import asyncio
import dataclasses
import itertools
import json
import resource
import sys
import time

import grpc
import numpy as np

from jaxserve.bench.frontend.http2 import GrpcStreams
from jaxserve.bench.frontend.stalled import stalled_clients
from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.server.v1 import jaxserve_pb2_grpc
from jaxserve.testing.fake_server import TOKEN

_TOKEN = TOKEN.encode()
_MAX_TOKENS = 60_000  # more than any run takes: streams are cut at its end
NUM_TIMED_STREAMS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientSpec:
    """What to do.

    Attributes:
        transport: "sse" or "grpc".
        grpc_address, http_address: the server's, host:port.
        num_streams: at the same time.
        num_connections: that gRPC's streams share; SSE has one for each.
        warmup_seconds, seconds: before counting, and of counting.
        num_stalled: further clients, which connect and then stall.
    """

    transport: str
    grpc_address: str
    http_address: str
    num_streams: int
    num_connections: int
    warmup_seconds: float
    seconds: float
    num_stalled: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientResult:
    """What came of it, in the time that counted.

    Attributes:
        seconds: how long that was.
        num_tokens: that came here.
        num_messages: that they came in, of the streams that are timed.
        num_timed_tokens: tokens of those streams.
        num_emitted, num_steps: the engine's own counts of tokens and steps.
        engine_seconds: between those counts.
        itl_p50_ms, itl_p99_ms: time between messages of a timed stream, per token.
        cpu_seconds: of this process.
        num_open: streams that had not ended in the end; all of them, if nothing went wrong.
        num_stalled: stalled clients that were connected in the end.
    """

    seconds: float
    num_tokens: int
    num_messages: int
    num_timed_tokens: int
    num_emitted: int
    num_steps: int
    engine_seconds: float
    itl_p50_ms: float
    itl_p99_ms: float
    cpu_seconds: float
    num_open: int
    num_stalled: int


class Counter:
    """Counts tokens, and for some streams when they came."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.times: list[list[tuple[float, int]]] = []

    def count(self, num_tokens: int) -> None:
        """So many tokens came."""
        self.num_tokens += num_tokens

    def timed(self):
        """A `count` for one stream, which notes the time."""
        times: list[tuple[float, int]] = []
        self.times.append(times)

        def count(num_tokens: int) -> None:
            if num_tokens:
                self.num_tokens += num_tokens
                times.append((time.perf_counter(), num_tokens))

        return count


class SseStream(asyncio.Protocol):
    """One streamed chat over HTTP/1.1.

    Args:
        on_tokens: told how many tokens came.
    """

    def __init__(self, on_tokens) -> None:
        self._on_tokens = on_tokens
        self.num_open = 1
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        body = json.dumps({
            "messages": [{"role": "user", "content": "hi"}], "stream": True,
            "max_tokens": _MAX_TOKENS, "temperature": 0, "ignore_eos": True,
        }).encode()  # fmt: skip
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        transport.write(head.encode() + body)

    def data_received(self, data: bytes) -> None:
        """Count: the token is in nothing else that a stream is made of."""
        self._on_tokens(data.count(_TOKEN))

    def connection_lost(self, exc: Exception | None) -> None:
        """The stream has ended."""
        self.num_open = 0


async def run_clients(spec: ClientSpec) -> ClientResult:
    """Open all streams, and count for a while."""
    loop = asyncio.get_running_loop()
    counter = Counter()
    protocols: list[SseStream | GrpcStreams] = []
    host, _, port = (
        spec.http_address if spec.transport == "sse" else spec.grpc_address
    ).rpartition(":")
    for make in _protocols(spec, counter):
        _, protocol = await loop.create_connection(make, host, int(port))
        protocols.append(protocol)
    async with (
        stalled_clients(spec.num_stalled, spec.http_address, spec.grpc_address) as stalled,
        grpc.aio.insecure_channel(spec.grpc_address) as channel,
    ):
        stub = jaxserve_pb2_grpc.JaxserveStub(channel)
        await asyncio.sleep(spec.warmup_seconds)
        cpu, begun, tokens = _cpu_seconds(), time.perf_counter(), counter.num_tokens
        load, load_at = await stub.GetLoad(pb.GetLoadRequest()), time.perf_counter()
        await asyncio.sleep(max(0.0, begun + spec.seconds - time.perf_counter()))
        ended, tokens = time.perf_counter(), counter.num_tokens - tokens
        cpu = _cpu_seconds() - cpu
        later, later_at = await stub.GetLoad(pb.GetLoadRequest()), time.perf_counter()
        num_open = sum(protocol.num_open for protocol in protocols)
        num_stalled = stalled.num_open
    for protocol in protocols:
        if protocol.transport is not None:
            protocol.transport.abort()
    gaps, num_messages, num_timed = _gaps(counter, begun, ended)
    return ClientResult(
        seconds=ended - begun,
        num_tokens=tokens,
        num_messages=num_messages,
        num_timed_tokens=num_timed,
        num_emitted=later.num_generated_tokens - load.num_generated_tokens,
        num_steps=later.num_steps - load.num_steps,
        engine_seconds=later_at - load_at,
        itl_p50_ms=float(np.percentile(gaps, 50)) * 1e3,
        itl_p99_ms=float(np.percentile(gaps, 99)) * 1e3,
        cpu_seconds=cpu,
        num_open=num_open,
        num_stalled=num_stalled,
    )


def _protocols(spec: ClientSpec, counter: Counter):
    if spec.transport == "sse":
        for i in range(spec.num_streams):
            count = counter.timed() if i < NUM_TIMED_STREAMS else counter.count
            yield lambda count=count: SseStream(count)
        return
    params = pb.SamplingParams(temperature=0, max_tokens=_MAX_TOKENS, ignore_eos=True)
    request = pb.GenerateRequest(text="hi", sampling_params=params)
    # Timed streams have connections of their own, as a message does not say whose it is.
    num_timed = min(NUM_TIMED_STREAMS, spec.num_streams)
    for _ in range(num_timed):
        timed = counter.timed()
        yield lambda count=timed: GrpcStreams([request], count)
    rest = spec.num_streams - num_timed
    for i in range(spec.num_connections):
        share = rest // spec.num_connections + (i < rest % spec.num_connections)
        if share:
            yield lambda share=share: GrpcStreams([request] * share, counter.count)


def _gaps(counter: Counter, begun: float, ended: float) -> tuple[np.ndarray, int, int]:
    """Seconds between messages per token, and how many messages and tokens there were."""
    gaps: list[float] = []
    num_messages = num_tokens = 0
    for times in counter.times:
        inside = [(at, count) for at, count in times if begun <= at <= ended]
        num_messages += len(inside)
        num_tokens += sum(count for _, count in inside)
        for (earlier, _), (later, _) in itertools.pairwise(inside):
            gaps.append(later - earlier)
    return np.array(gaps or [float("nan")]), num_messages, num_tokens


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Run as a process."""
    spec = ClientSpec(**json.loads(sys.argv[1]))
    print(json.dumps(dataclasses.asdict(asyncio.run(run_clients(spec)))))


if __name__ == "__main__":
    main()
