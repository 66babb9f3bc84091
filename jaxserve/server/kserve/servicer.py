"""The `inference.GRPCInferenceService` service over an `AsyncEngine`.

The served model is one that takes texts and gives texts. The names of its tensors are those of
Triton's vLLM backend, so that what was written for that works here.
"""

import asyncio
import contextlib
import importlib.metadata
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any, NamedTuple

import grpc

from jaxserve.core.errors import InvalidRequest, JaxserveError, ModelNotFound
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.outputs import TokenDelta
from jaxserve.server.answers import stream_answers
from jaxserve.server.call_metadata import MAX_REQUEST_ID_CHARS, new_request_id, traceparent
from jaxserve.server.context import ServerContext
from jaxserve.server.kserve import open_inference_pb2 as pb
from jaxserve.server.kserve import open_inference_pb2_grpc
from jaxserve.server.kserve.management import model_config, model_statistics
from jaxserve.server.kserve.parameters import Parameters, read_json, read_parameters
from jaxserve.server.kserve.tensors import Tensor, read_inputs, refuse_parameters, write_outputs
from jaxserve.server.prompts import text_token_ids
from jaxserve.server.security.caller import on_account
from jaxserve.server.status import status_of

VERSION = "1"  # the only one that a model here has
MAX_REQUESTS_PER_STREAM = 256

_INPUTS = {"text_input": "BYTES", "sampling_parameters": "BYTES", "stream": "BOOL"}
_OUTPUTS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
_EMPTY_FINAL = "triton_enable_empty_final_response"  # Triton's names
_IS_FINAL = "triton_final_response"


_Deltas = contextlib.aclosing[AsyncGenerator[tuple[int, TokenDelta], None]]


class _Work(NamedTuple):
    """A request, read: the texts' token ids, the rest, and how it wants to be answered."""

    engine: AsyncEngine
    prompts: list[list[int]]
    shape: tuple[int, ...]
    parameters: Parameters
    outputs: list[str]
    streams: bool
    empty_final: bool


class _Answer:
    """What has come of one text's answer."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.last: TokenDelta | None = None

    def add(self, delta: TokenDelta) -> None:
        self.texts.append(delta.text)
        self.last = delta

    def take(self) -> dict[str, bytes | int]:
        """By output, what is new since the last call."""
        text = "".join(self.texts)
        self.texts.clear()
        last = self.last
        return {
            "text_output": text.encode(),
            "finish_reason": (last.finish_reason or "").encode() if last else b"",
            "num_input_tokens": last.num_prompt_tokens if last else 0,
            "num_output_tokens": last.num_output_tokens if last else 0,
        }


class InferenceServicer(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers RPCs; raises the errors of `core/errors.py`, which `handlers` translates.

    Args:
        context: the server's.
    """

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerLiveResponse:
        """Whether the process answers: it does."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerReadyResponse:
        """Whether requests are taken."""
        return pb.ServerReadyResponse(ready=self._is_ready)

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelReadyResponse:
        """Whether requests for a model are taken."""
        if self._context.engine is not None:
            self._engine_for(request.name, request.version)
        return pb.ModelReadyResponse(ready=self._is_ready)

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerMetadataResponse:
        """What server this is."""
        return pb.ServerMetadataResponse(
            name="jaxserve",
            version=importlib.metadata.version("jaxserve"),
            extensions=["model_configuration", "statistics"],
        )

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelMetadataResponse:
        """The model's tensors."""
        engine = self._engine_for(request.name, request.version)
        response = pb.ModelMetadataResponse(
            name=engine.model_info.name, versions=[VERSION], platform="jaxserve"
        )
        for name, datatype in _INPUTS.items():
            shape = -1 if name == "text_input" else 1
            response.inputs.add(name=name, datatype=datatype, shape=[shape])
        for name, datatype in _OUTPUTS.items():
            response.outputs.add(name=name, datatype=datatype, shape=[-1])
        return response

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: grpc.aio.ServicerContext
    ) -> pb.RepositoryIndexResponse:
        """The one model; none while it is being loaded, for its name is not known yet."""
        if request.repository_name:
            raise InvalidRequest(
                "repository_name: the server's model is of no repository", param="repository_name"
            )
        response, engine = pb.RepositoryIndexResponse(), self._context.engine
        if engine is not None and (self._is_ready or not request.ready):
            state = "READY" if self._is_ready else "UNAVAILABLE"
            reason = "" if self._is_ready else "the server takes no new requests"
            name = engine.model_info.name
            response.models.add(name=name, version=VERSION, state=state, reason=reason)
        return response

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelConfigResponse:
        """The model as Triton would describe it."""
        info = self._engine_for(request.name, request.version).model_info
        return pb.ModelConfigResponse(config=model_config(info, _INPUTS, _OUTPUTS, "text_input"))

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelStatisticsResponse:
        """How many requests there were, by whichever protocol, and how long they took."""
        name = self._engine_for(request.name, request.version).model_info.name
        totals = self._context.observability.metrics.totals
        return pb.ModelStatisticsResponse(model_stats=[model_statistics(name, VERSION, totals)])

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInferResponse:
        """The answers to one text or several, whole."""
        work = await self._read(request, context)
        if work.streams or work.empty_final:
            raise InvalidRequest("only ModelStreamInfer answers in pieces", param="stream")
        answers = [_Answer() for _ in work.prompts]
        async with self._deltas(request, work) as deltas:
            async for index, delta in deltas:
                answers[index].add(delta)
        return _response(request, work, answers)

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: grpc.aio.ServicerContext
    ) -> None:
        """Answers to all requests of a stream, each whole or in pieces, as they come.

        What is wrong with one request is said in its response's error_message, as Triton does;
        the others go on.
        """
        writing = asyncio.Lock()
        room = asyncio.Semaphore(MAX_REQUESTS_PER_STREAM)

        async def write(response: pb.ModelStreamInferResponse) -> None:
            async with writing:
                await context.write(response)

        async def answer(request: pb.ModelInferRequest) -> None:
            try:
                async with contextlib.aclosing(self._pieces(request, context)) as pieces:
                    async for response in pieces:
                        await write(pb.ModelStreamInferResponse(infer_response=response))
            except JaxserveError as error:
                code, message = status_of(error)
                response = pb.ModelStreamInferResponse(error_message=f"{code.name}: {message}")
                response.infer_response.id = request.id
                await write(response)
            finally:
                room.release()

        with _first_of_group():
            async with asyncio.TaskGroup() as group:
                async for request in requests:
                    await room.acquire()
                    group.create_task(answer(request))

    async def _pieces(
        self, request: pb.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        """The responses to a request of a stream; the last one is marked as Triton does."""
        work = await self._read(request, context)
        if work.streams and len(work.prompts) > 1:
            raise InvalidRequest("only one text can be answered in pieces", param="stream")
        answers = [_Answer() for _ in work.prompts]
        num_open = len(answers)
        async with self._deltas(request, work) as deltas:
            async for index, delta in deltas:
                answers[index].add(delta)
                num_open -= delta.finish_reason is not None
                if num_open and not work.streams:
                    continue
                response = _response(request, work, answers)
                response.parameters[_IS_FINAL].bool_param = not (num_open or work.empty_final)
                yield response
        if work.empty_final:
            response = pb.ModelInferResponse(
                model_name=work.engine.model_info.name, model_version=VERSION, id=request.id
            )
            response.parameters[_IS_FINAL].bool_param = True
            yield response

    def _deltas(self, request: pb.ModelInferRequest, work: _Work) -> _Deltas:
        sampling, service, asks_max_tokens = work.parameters
        # Ids need not be unique in this protocol; the engine's must be.
        request_id = new_request_id(request.id)
        return contextlib.aclosing(
            stream_answers(
                self._context,
                work.engine,
                request_id,
                work.prompts,
                sampling,
                service,
                asks_max_tokens=asks_max_tokens,
            )
        )

    async def _read(
        self, request: pb.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> _Work:
        engine = self._engine_for(request.model_name, request.model_version)
        limits = self._context.limits
        if len(request.id) > MAX_REQUEST_ID_CHARS:
            raise InvalidRequest(f"id has more than {MAX_REQUEST_ID_CHARS} characters", param="id")
        tensors = read_inputs(request, _INPUTS)
        if "text_input" not in tensors:
            raise InvalidRequest("there is no input text_input", param="text_input")
        parameters = dict(request.parameters)
        empty_final = parameters.pop(_EMPTY_FINAL, None)
        more = _only(tensors.get("sampling_parameters"))
        read = read_parameters(
            parameters,
            {} if more is None else read_json(more, limits),
            vocab_size=engine.model_info.vocab_size,
            limits=limits,
            defaults=engine.model_info.default_sampling_params,
            traceparent=traceparent(context),
        )
        read = read._replace(service=on_account(read.service))
        texts = tensors["text_input"]
        limits.check("max_prompts", len(texts.values), "text_input")
        prompts = [
            await text_token_ids(_text(t), engine.tokenizer, limits, param="text_input")
            for t in texts.values
        ]
        return _Work(
            engine, prompts, texts.shape, read, _wanted(request),
            streams=bool(_only(tensors.get("stream"))),
            empty_final=empty_final is not None and empty_final.bool_param,
        )  # fmt: skip

    @property
    def _is_ready(self) -> bool:
        return self._context.engine is not None and self._context.engine.is_ready

    def _engine_for(self, model: str, version: str) -> AsyncEngine:
        engine = self._context.engine_for(model)
        if version not in ("", VERSION):
            raise ModelNotFound(f"the model has only version {VERSION}, not {version!r}")
        return engine


def _wanted(request: pb.ModelInferRequest) -> list[str]:
    """Names of the outputs that a request asks for."""
    names = [output.name for output in request.outputs]
    for output in request.outputs:
        if output.name not in _OUTPUTS:
            raise InvalidRequest(f"there is no output {output.name!r}", param=output.name)
        if names.count(output.name) > 1:
            raise InvalidRequest(f"output {output.name} is asked for twice", param=output.name)
        refuse_parameters(f"output {output.name}", output.parameters)
    return names or list(_OUTPUTS)


def _response(
    request: pb.ModelInferRequest, work: _Work, answers: list[_Answer]
) -> pb.ModelInferResponse:
    response = pb.ModelInferResponse(
        model_name=work.engine.model_info.name, model_version=VERSION, id=request.id
    )
    rows = [answer.take() for answer in answers]
    tensors = [
        Tensor(name, _OUTPUTS[name], work.shape, [row[name] for row in rows])
        for name in work.outputs
    ]
    write_outputs(response, tensors, raw=bool(request.raw_input_contents))
    return response


def _text(element: bytes) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"text_input is not UTF-8: {error}", param="text_input") from error


def _only(tensor: Tensor | None) -> Any:
    """The one element of a tensor, or None if there is no tensor."""
    if tensor is None:
        return None
    if len(tensor.values) != 1:
        raise InvalidRequest(f"input {tensor.name} must have one element", param=tensor.name)
    return tensor.values[0]


@contextlib.contextmanager
def _first_of_group() -> Iterator[None]:
    """Of the errors of a task group, raise the first by itself."""
    try:
        yield
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
