"""Joins a servicer to a gRPC service: parsing, and every error turned into its status."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from jaxserve.core.errors import InvalidRequest, JaxserveError
from jaxserve.server.log_format import about_request
from jaxserve.server.retry import retry_metadata
from jaxserve.server.security.streams import StreamWatch
from jaxserve.server.status import status_of
from jaxserve.server.strict import reject_unknown_fields

log = logging.getLogger(__name__)

Method = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Message | None]]


def generic_handler(
    service: ServiceDescriptor, servicer: object, streams: StreamWatch
) -> grpc.GenericRpcHandler:
    """Handlers for all methods of a service, as protoc's `add_..._to_server` but stricter.

    A request that does not parse (say, invalid UTF-8) is INVALID_ARGUMENT, where the generated
    function leaves gRPC to say UNKNOWN; a `JaxserveError` becomes its status; any other
    exception is logged and becomes INTERNAL without telling the caller more.

    Args:
        service: the service's descriptor; its methods take one request, and answer with one
            message or a stream, or take a stream and answer with one.
        servicer: has one coroutine method per RPC: `(request, context)` (an async iterator of
            requests if it takes a stream), returning the answer, or writing a stream with
            `context.write`.
        streams: cuts off streams whose clients read nothing.
    """
    handlers = {
        method.name: _method_handler(method, getattr(servicer, method.name), streams)
        for method in service.methods
    }
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _method_handler(
    method: MethodDescriptor, function: Method, streams: StreamWatch
) -> grpc.RpcMethodHandler:
    request_type = GetMessageClass(method.input_type)
    response_type = GetMessageClass(method.output_type)
    if method.client_streaming:
        make, check = grpc.stream_stream_rpc_method_handler, _checked_stream
    elif method.server_streaming:
        make, check = grpc.unary_stream_rpc_method_handler, _checked
    else:
        make, check = grpc.unary_unary_rpc_method_handler, _checked
    if method.server_streaming:
        function = _watched(function, streams)
    return make(
        _guarded(method.full_name, function, check),
        request_deserializer=_lenient_parser(request_type),
        response_serializer=response_type.SerializeToString,
    )


def _watched(function: Method, streams: StreamWatch) -> Method:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Message | None:
        async with streams.watching(context) as watched:
            return await function(request, cast("grpc.aio.ServicerContext", watched))

    return call


def _lenient_parser(request_type: type[Message]) -> Callable[[bytes], Message | InvalidRequest]:
    """A parser that returns its error: gRPC would turn a raised one into UNKNOWN."""

    def parse(data: bytes) -> Message | InvalidRequest:
        try:
            return request_type.FromString(data)
        except DecodeError:
            name = request_type.DESCRIPTOR.name
            return InvalidRequest(f"not a valid {name} (are all its strings UTF-8?)")

    return parse


def _checked(request: Message | InvalidRequest) -> Message:
    if isinstance(request, InvalidRequest):
        raise request
    reject_unknown_fields(request)
    return request


async def _checked_stream(
    requests: AsyncIterator[Message | InvalidRequest],
) -> AsyncIterator[Message]:
    async for request in requests:
        yield _checked(request)


def _guarded(name: str, function: Method, check: Callable[[Any], Any]) -> Method:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Message | None:
        with about_request(_id_of(request)):
            return await answer(request, context)

    async def answer(request: Any, context: grpc.aio.ServicerContext) -> Message | None:
        try:
            return await function(check(request), context)
        except JaxserveError as error:
            code, message = status_of(error)
            log.debug("%s: %s: %s", name, code.name, message)
            if code is grpc.StatusCode.INTERNAL:
                log.error("%s failed", name, exc_info=error)
            await context.abort(code, message, retry_metadata(error, code, message))
        except grpc.aio.BaseError:
            log.debug("%s: the client went away", name, exc_info=True)
            raise
        except Exception:
            log.exception("%s failed", name)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the server's log")
        return None

    return call


def _id_of(request: Any) -> str:
    """What a message calls its request, for the log; empty if it does not."""
    return getattr(request, "request_id", "") or getattr(request, "id", "")
