"""The `jaxserve.v1.Jaxserve` service over an `AsyncEngine`."""

import contextlib
from collections.abc import AsyncGenerator
from typing import cast

import grpc

from jaxserve.core.errors import Draining, InvalidRequest
from jaxserve.core.request import FinishReason
from jaxserve.engine.outputs import TokenDelta
from jaxserve.server import convert
from jaxserve.server.context import ServerContext
from jaxserve.server.security.caller import on_account, own_requests_only
from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.server.v1 import jaxserve_pb2_grpc


class JaxserveServicer(jaxserve_pb2_grpc.JaxserveServicer):
    """Answers RPCs; raises the errors of `core/errors.py`, which `handlers` translates.

    Until there is an engine every call fails with `Draining` (UNAVAILABLE).

    Args:
        context: the server's.
    """

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Stream an answer.

        Messages are written here rather than yielded: gRPC cancels this coroutine when the
        client goes away or the deadline passes, and only so is the engine's stream closed, and
        the request aborted, at once in either place where we may be waiting.
        """
        engine = self._context.engine_for(request.model)
        request_id = convert.request_id(request.request_id)
        info = engine.model_info
        params = convert.sampling_params(request.sampling_params, vocab_size=info.vocab_size)
        service = on_account(convert.service_params(request.service_params))
        prompt = await convert.prompt_token_ids(request, engine.tokenizer, info.max_model_len)
        deltas = cast(
            "AsyncGenerator[TokenDelta, None]",
            engine.generate(request_id, prompt, params, service),
        )
        with self._context.answering():
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    await context.write(convert.generate_response(delta))
                    if delta.finish_reason is FinishReason.ABORT and not engine.is_ready:
                        raise Draining("the server stopped before the answer was complete")

    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        """Stop a request by its id; another tenant's is as good as unknown."""
        if not request.request_id:
            raise InvalidRequest("request_id is empty")
        engine = self._context.engine_for()
        aborted = engine.abort(request.request_id, tenant=own_requests_only())
        return pb.AbortResponse(aborted=aborted)

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeResponse:
        """The token ids of a text or a chat."""
        engine = self._context.engine_for(request.model)
        max_model_len = engine.model_info.max_model_len
        ids = await convert.prompt_token_ids(request, engine.tokenizer, max_model_len)
        return pb.TokenizeResponse(token_ids=ids, max_model_len=max_model_len)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        """Facts about the served model."""
        return convert.model_info(self._context.engine_for(request.model).model_info)

    async def GetLoad(
        self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetLoadResponse:
        """The engine's gauges and counters."""
        return convert.load(self._context.engine_for().load())
