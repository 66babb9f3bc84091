"""One generation over HTTP: begun before the answer's first byte, ended with its client."""

import asyncio
import contextlib
import dataclasses
import re
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.outputs import TokenDelta
from jaxserve.server.answers import stream_answers
from jaxserve.server.call_metadata import MAX_REQUEST_ID_CHARS, valid_traceparent
from jaxserve.server.choices import Choices
from jaxserve.server.context import ServerContext
from jaxserve.server.http.errors import ClientGone
from jaxserve.server.http.json_bytes import json_bytes

_PRINTABLE = re.compile(r"[\x21-\x7e]+")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a request asks of the engine.

    Attributes:
        request_id: the request's, from which those of its choices are made.
        prompts: token ids of each prompt.
        params, service: for all of them.
        asks_max_tokens: whether `params.max_tokens` is the caller's, not a default.
        n: choices per prompt; choice j of prompt p is number p * n + j.
    """

    request_id: str
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    service: ServiceParams
    asks_max_tokens: bool
    n: int = 1

    @property
    def num_choices(self) -> int:
        """Answers to all prompts."""
        return len(self.prompts) * self.n


class Generation:
    """The deltas of a job whose first one has come: whatever refuses a request has done so.

    An async iterator of (choice, delta); `aclose` aborts what has not ended. It must be called,
    also if nothing was read.
    """

    def __init__(self, stream: Choices, first: tuple[int, TokenDelta] | None) -> None:
        self._stream = stream
        self._first = first

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> tuple[int, TokenDelta]:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        return await anext(self._stream)

    async def aclose(self) -> None:
        """Abort what still runs. Idempotent."""
        await self._stream.aclose()


async def begin(
    request: Request, context: ServerContext, engine: AsyncEngine, job: Job
) -> Generation:
    """Start a job and wait for its first delta.

    Raises:
        InvalidRequest, QueueFull, TargetMissed, Draining, EngineDead: from the engine.
        ClientGone: the client went away meanwhile; the job is aborted.
    """
    stream = stream_answers(
        context,
        engine,
        job.request_id,
        job.prompts,
        job.params,
        job.service,
        n=job.n,
        asks_max_tokens=job.asks_max_tokens,
    )
    try:
        first = await until_disconnect(request.receive, _next(stream))
    except BaseException:
        await stream.aclose()
        raise
    return Generation(stream, first)


async def _next(stream: Choices) -> tuple[int, TokenDelta] | None:
    return await anext(stream, None)


class Answer(Protocol):
    """Collects the deltas of all choices into one object."""

    def push(self, choice: int, delta: TokenDelta) -> None:
        """Take a delta."""
        ...

    def finish(self) -> dict[str, Any]:
        """The object, once all deltas are taken."""
        ...


async def collect(request: Request, generation: Generation, answer: Answer) -> dict[str, Any]:
    """Read a generation to its end, and close it.

    Raises:
        Draining, EngineDead: from the engine.
        ClientGone: the client went away; what still ran is aborted.
    """

    async def read() -> None:
        async for choice, delta in generation:
            answer.push(choice, delta)

    async with contextlib.aclosing(generation):
        await until_disconnect(request.receive, read())
    return answer.finish()


def json_response(value: Any) -> Response:
    """An object as JSON."""
    return Response(json_bytes(value), media_type="application/json")


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await something, but cancel it when the client goes away.

    Args:
        receive: ASGI's; the request's body must have been read.
        work: what to do.

    Raises:
        ClientGone: the client went first.
    """
    doing = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((doing, watching), return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientGone
    finally:
        for task in (watching, doing):
            task.cancel()
        await asyncio.gather(watching, doing, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def request_id_of(request: Request, given: str | None) -> str:
    """The id under which a request is generated and can be aborted.

    Args:
        request: its `X-Request-Id`, which gateways set and repeat, becomes the beginning of one.
        given: the body's, which is taken as it is.

    Raises:
        InvalidRequest: the given id is too long, or not made of printable ASCII.
    """
    if given:
        return checked_id(given, "request_id")
    header = request.headers.get("x-request-id", "")
    drawn = uuid.uuid4().hex
    return f"{header}-{drawn[:8]}" if header else drawn


def checked_id(text: str, param: str) -> str:
    """A caller's id, which goes into logs and headers.

    Raises:
        InvalidRequest: it is too long, or not made of printable ASCII.
    """
    if len(text) > MAX_REQUEST_ID_CHARS or not _PRINTABLE.fullmatch(text):
        raise InvalidRequest(
            f"{param} must be at most {MAX_REQUEST_ID_CHARS} printable ASCII characters",
            param=param,
        )
    return text


def traceparent_of(request: Request) -> str:
    """The W3C trace context of a request; empty if it has none, or none that is valid."""
    return valid_traceparent(request.headers.get("traceparent", ""))
