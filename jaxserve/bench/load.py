"""A load generator: sends a workload to a gRPC server and notes when every token came."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import grpc
import numpy as np
from tqdm import tqdm

from jaxserve.bench.workloads import WorkloadItem
from jaxserve.core.errors import ConfigError, JaxserveError
from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.server.v1 import jaxserve_pb2_grpc

_MAX_MESSAGE_BYTES = 64 * 2**20


@dataclasses.dataclass(kw_only=True)
class RequestRecord:
    """What happened to one request; times in seconds since the benchmark's start.

    Attributes:
        prompt_len: tokens sent.
        start: when it was sent (behind the concurrency limit, if there is one).
        delta_times, delta_tokens: arrival and number of tokens of each message with tokens.
        text: what was generated.
        error: why it failed; None if it did not.
    """

    prompt_len: int
    start: float = 0.0
    delta_times: list[float] = dataclasses.field(default_factory=list)
    delta_tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    error: str | None = None

    @property
    def output_len(self) -> int:
        """Tokens received."""
        return sum(self.delta_tokens)


@dataclasses.dataclass(frozen=True)
class LoadResult:
    """All records, in order of arrival, and the seconds from the start to the last end."""

    records: tuple[RequestRecord, ...]
    duration: float


Clock = Callable[[], float]
Send = Callable[[WorkloadItem, RequestRecord, Clock], Awaitable[None]]


def arrival_times(
    items: Sequence[WorkloadItem],
    request_rate: float | None = None,
    burstiness: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """When each request is sent, float64 [items], in seconds from the start, ascending.

    Args:
        items: the workload.
        request_rate: requests per second; infinity sends all at once; None keeps the items'
            own times, or sends all at once where they have none.
        burstiness: shape of the gamma-distributed gaps: 1 is a Poisson process, less comes in
            bursts, more is steadier. As in vLLM, gaps are scaled to make the mean rate exact.
        seed: of the gaps.

    Raises:
        ConfigError: a rate or burstiness that is not positive.
    """
    if burstiness <= 0 or (request_rate is not None and not request_rate > 0):
        raise ConfigError("request rate and burstiness must be positive")
    if request_rate is None:
        return np.array([item.arrival or 0.0 for item in items])
    if np.isinf(request_rate):
        return np.zeros(len(items))
    gaps = np.random.default_rng(seed).gamma(burstiness, 1.0, len(items))
    times = np.cumsum(gaps)
    return times * (len(items) / request_rate / times[-1])


async def run_load(
    items: Sequence[WorkloadItem],
    arrivals: np.ndarray,
    send: Send,
    *,
    max_concurrency: int | None = None,
    progress: bool = True,
) -> LoadResult:
    """Send every item at its time and wait for all of them; a failed one stops nobody.

    Args:
        items: the workload.
        arrivals: when each is sent, seconds from the start, ascending.
        send: sends one item and fills its record in.
        max_concurrency: requests under way at once, at most; the others wait their turn.
        progress: show a bar on stderr.
    """
    limit = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
    records = tuple(RequestRecord(prompt_len=len(item.prompt_token_ids)) for item in items)
    started = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - started

    with tqdm(total=len(items), unit="req", disable=not progress) as bar:

        async def one(item: WorkloadItem, record: RequestRecord) -> None:
            async with limit:
                record.start = clock()
                await send(item, record, clock)
            bar.update()

        async with asyncio.TaskGroup() as group:
            for item, record, arrival in zip(items, records, arrivals, strict=True):
                if (delay := arrival - clock()) > 0:
                    await asyncio.sleep(delay)
                group.create_task(one(item, record))
        return LoadResult(records, clock())


class GrpcClient:
    """Sends workload items to a jaxserve gRPC server. Use `connect` to make one."""

    def __init__(
        self, channel: grpc.aio.Channel, model: str, ignore_eos: bool, temperature: float
    ) -> None:
        self._stub = jaxserve_pb2_grpc.JaxserveStub(channel)
        self._model, self._ignore_eos, self._temperature = model, ignore_eos, temperature

    async def model_info(self, timeout: float) -> pb.GetModelInfoResponse:
        """Facts about the served model, as soon as the server is ready.

        Args:
            timeout: seconds to wait for that.

        Raises:
            JaxserveError: it was not ready in time, or serves another model.
        """
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            try:
                request = pb.GetModelInfoRequest(model=self._model)
                return await self._stub.GetModelInfo(request, timeout=max(left, 1.0))
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or left <= 0:
                    raise JaxserveError(f"no answer from the server: {_reason(error)}") from error
            await asyncio.sleep(min(0.5, max(left, 0.0)))

    async def send(self, item: WorkloadItem, record: RequestRecord, clock: Clock) -> None:
        """Run one request to its end; an error goes into the record."""
        request = pb.GenerateRequest(
            model=self._model,
            token_ids=pb.TokenIds(ids=item.prompt_token_ids.tolist()),
            sampling_params=pb.SamplingParams(
                temperature=self._temperature,
                max_tokens=item.output_len,
                ignore_eos=self._ignore_eos,
            ),
        )
        texts = []
        record.start = clock()
        finished = False
        try:
            async for message in self._stub.Generate(request):
                if message.token_ids:
                    record.delta_times.append(clock())
                    record.delta_tokens.append(len(message.token_ids))
                texts.append(message.text)
                finished = message.finish_reason in (
                    pb.FINISH_REASON_STOP,
                    pb.FINISH_REASON_LENGTH,
                )
        except grpc.aio.AioRpcError as error:
            record.error = _reason(error)
        else:
            if not finished:
                record.error = "ABORTED: the stream ended early"
        record.text = "".join(texts)


@contextlib.asynccontextmanager
async def connect(
    address: str, *, model: str = "", ignore_eos: bool = True, temperature: float = 0.0
) -> AsyncIterator[GrpcClient]:
    """A client of the server at `address` (host:port).

    Args:
        address: where the server listens.
        model: the model to ask for; empty takes what is served.
        ignore_eos: generate on past EOS, so that every answer has its full length.
        temperature: of the sampling; 0 is greedy.
    """
    options = [
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield GrpcClient(channel, model, ignore_eos, temperature)


def _reason(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details()}"
