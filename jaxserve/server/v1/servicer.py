"""The `jaxserve.v1.Jaxserve` service over an `AsyncEngine`."""

import contextlib

import grpc

from jaxserve.core.errors import InvalidRequest
from jaxserve.server.answers import stream_answers
from jaxserve.server.call_metadata import new_request_id, request_id
from jaxserve.server.context import ServerContext
from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.server.v1 import jaxserve_pb2_grpc, responses
from jaxserve.server.v1.prompts import prompt_token_ids
from jaxserve.server.v1.sampling import sampling_params, service_params


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
        """Stream an answer, or several.

        Messages are written here rather than yielded: gRPC cancels this coroutine when the
        client goes away or the deadline passes, and only so is the engine's stream closed, and
        the request aborted, at once in either place where we may be waiting.
        """
        engine, limits = self._context.engine_for(request.model), self._context.limits
        info, tokenizer = engine.model_info, engine.tokenizer
        rid = request_id(request.request_id, context) or new_request_id()
        n = request.n if request.HasField("n") else 1
        if n < 1:
            raise InvalidRequest("n must be at least 1", param="n")
        limits.check("max_n", n, "n")
        service = service_params(request.service_params, context)
        prompt = await prompt_token_ids(request, tokenizer, info.max_model_len, limits)
        params = sampling_params(
            request.sampling_params,
            prompt=prompt,
            tokenizer=tokenizer,
            vocab_size=info.vocab_size,
            limits=limits,
            defaults=info.default_sampling_params,
        )
        answers = stream_answers(
            self._context,
            engine,
            rid,
            [prompt],
            params,
            service,
            n=n,
            asks_max_tokens=request.sampling_params.HasField("max_tokens"),
        )
        async with contextlib.aclosing(answers):
            async for index, delta in answers:
                await context.write(responses.generate_response(delta, rid, index))

    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        """Stop a request by its id; another tenant's is as good as unknown."""
        if not request.request_id:
            raise InvalidRequest("request_id is empty", param="request_id")
        return pb.AbortResponse(aborted=self._context.abort(request.request_id))

    async def Embed(
        self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> pb.EmbedResponse:
        """The vector of a text or a chat."""
        engine, limits = self._context.engine_for(request.model), self._context.limits
        rid = request_id(request.request_id, context)
        service = service_params(request.service_params, context)
        max_model_len = engine.model_info.max_model_len
        prompt = await prompt_token_ids(request, engine.tokenizer, max_model_len, limits)
        with self._context.answering():
            return responses.embed_response(await engine.embed(rid, prompt, service))

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeResponse:
        """The token ids of a text or a chat."""
        engine = self._context.engine_for(request.model)
        max_model_len = engine.model_info.max_model_len
        ids = await prompt_token_ids(request, engine.tokenizer, max_model_len, self._context.limits)
        return pb.TokenizeResponse(token_ids=ids, max_model_len=max_model_len)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        """Facts about the served model."""
        return responses.model_info(self._context.engine_for(request.model).model_info)

    async def GetLoad(
        self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetLoadResponse:
        """The engine's gauges and counters."""
        return responses.load(self._context.engine_for().load())
