"""The `vllm.grpc.engine.VllmEngine` service over an `AsyncEngine`.

The protocol is that of the package smg-grpc-proto, by which gateways that tokenize and detokenize
themselves drive vLLM: token ids in, token ids out.
"""

import asyncio
import contextlib
import time

import grpc
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.cache.page_keys import root_of
from jaxserve.core.errors import InvalidRequest, Unsupported
from jaxserve.core.service_params import ServiceParams
from jaxserve.server.answers import stream_answers
from jaxserve.server.call_metadata import new_request_id, request_id, traceparent
from jaxserve.server.context import ServerContext
from jaxserve.server.security.caller import on_account
from jaxserve.server.vllm_grpc import facts
from jaxserve.server.vllm_grpc.kv_events import KvEventStream
from jaxserve.server.vllm_grpc.requests import read_embed, read_generate
from jaxserve.server.vllm_grpc.responses import AnswerMessages
from jaxserve.server.vllm_grpc.tokenizer_files import archive_chunks, tokenizer_archive

_EVENT_SECONDS = 0.02  # between two looks for KV events
_MAX_SEQUENCE_NUMBER = 2**63  # of a uint64, so that there is room to count


class VllmEngineServicer(vllm_engine_pb2_grpc.VllmEngineServicer):
    """Answers RPCs; raises the errors of `core/errors.py`, which `handlers` translates.

    Args:
        context: the server's.
    """

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._started = time.monotonic()
        self._archive: bytes | None = None
        self._archiving = asyncio.Lock()

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """One answer or several, whole or as streams."""
        engine = self._context.engine_for()
        rid = request_id(request.request_id, context) or new_request_id()
        service = _service(context)
        read = await read_generate(
            request, engine.tokenizer, engine.model_info, self._context.limits
        )
        answers = [AnswerMessages(i, read.prompt, streams=request.stream) for i in range(read.n)]
        deltas = stream_answers(
            self._context,
            engine,
            rid,
            [read.prompt],
            read.params,
            service,
            n=read.n,
            asks_max_tokens=request.sampling_params.HasField("max_tokens"),
        )
        async with contextlib.aclosing(deltas):
            async for index, delta in deltas:
                for message in answers[index].add(delta):
                    await context.write(message)

    async def Embed(
        self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> pb.EmbedResponse:
        """The vector of a tokenized text."""
        engine = self._context.engine_for()
        rid = request_id(request.request_id, context)
        prompt = read_embed(request, engine.model_info)
        with self._context.answering():
            embedding = await engine.embed(rid, prompt, _service(context))
        return pb.EmbedResponse(
            embedding=embedding.values,
            prompt_tokens=embedding.num_prompt_tokens,
            embedding_dim=len(embedding.values),
        )

    async def HealthCheck(
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> pb.HealthCheckResponse:
        """Whether requests are taken.

        While warming up it fails, as all else: a gateway takes any answer for a worker that can be
        registered, and would go on to ask what cannot be answered yet.
        """
        if not self._context.engine_for().is_ready:
            return pb.HealthCheckResponse(healthy=False, message="draining, or the engine stopped")
        return pb.HealthCheckResponse(healthy=True, message="ready")

    async def FlushCache(
        self, request: common_pb2.FlushCacheRequest, context: grpc.aio.ServicerContext
    ) -> common_pb2.FlushCacheResponse:
        """Not offered: one caller would slow down all others."""
        raise Unsupported("FlushCache is not offered: the prefix cache cannot be emptied from here")

    async def StartProfile(
        self, request: common_pb2.StartProfileRequest, context: grpc.aio.ServicerContext
    ) -> common_pb2.ProfileResponse:
        """Not offered: it would let any caller write files."""
        raise Unsupported("StartProfile is not offered over this service")

    async def StopProfile(
        self, request: common_pb2.StopProfileRequest, context: grpc.aio.ServicerContext
    ) -> common_pb2.ProfileResponse:
        """Not offered, as StartProfile."""
        raise Unsupported("StopProfile is not offered over this service")

    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        """Stop requests by their ids; those that are not active are none of its business."""
        self._context.engine_for()
        for rid in request.request_ids:
            self._context.abort(rid)
        return pb.AbortResponse()

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        """Facts about the served model."""
        return facts.model_info(self._context.engine_for())

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        """Facts about how it is served."""
        return facts.server_info(self._context.engine_for(), time.monotonic() - self._started)

    async def GetLoads(
        self, request: pb.GetLoadsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetLoadsResponse:
        """How busy the engine is."""
        return facts.loads(self._context.engine_for(), request)

    async def GetTokenizer(
        self, request: common_pb2.GetTokenizerRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """The tokenizer's files as a ZIP archive in pieces."""
        tokenizer = self._context.engine_for().tokenizer
        async with self._archiving:
            if self._archive is None:  # it does not change
                self._archive = await asyncio.to_thread(tokenizer_archive, tokenizer)
        for chunk in archive_chunks(self._archive):
            await context.write(chunk)

    async def SubscribeKvEvents(
        self, request: common_pb2.SubscribeKvEventsRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """KV pages stored and removed from now on, until the server drains.

        Load records, which the protocol leaves to the server, are not among them: gateways then
        ask `GetLoads`.
        """
        engine = self._context.engine_for()
        root = root_of(_service(context))
        start = max(1, request.start_sequence_number)
        if start > _MAX_SEQUENCE_NUMBER:
            raise InvalidRequest(f"start_sequence_number is over {_MAX_SEQUENCE_NUMBER}")
        stream = KvEventStream(root, engine.model_info.page_size, start)
        with engine.kv_events.subscribe() as subscription:
            await context.send_initial_metadata(())
            while engine.is_ready:
                for batch in stream.batches(subscription.read()):
                    await context.write(batch)
                await asyncio.sleep(_EVENT_SECONDS)


def _service(context: grpc.aio.ServicerContext) -> ServiceParams:
    """What a call says of itself: the protocol has no words for tenants and priorities."""
    return on_account(ServiceParams(traceparent=traceparent(context)))
