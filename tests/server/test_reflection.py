"""A client that knows nothing beforehand, as grpcurl: it lists, describes and calls."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha import reflection_pb2 as rpb
from grpc_reflection.v1alpha import reflection_pb2_grpc


class Curl:
    """Knows of a server only what reflection says."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # pyright: ignore[reportArgumentType]
        self._pool = DescriptorPool()
        self._files: set[str] = set()

    async def services(self) -> list[str]:
        answer = await self._ask(list_services="")
        return [service.name for service in answer.list_services_response.service]

    async def method(self, service: str, name: str) -> MethodDescriptor:
        await self._load(file_containing_symbol=service)
        return self._pool.FindServiceByName(service).methods_by_name[name]

    async def methods(self, service: str) -> list[MethodDescriptor]:
        await self._load(file_containing_symbol=service)
        return list(self._pool.FindServiceByName(service).methods)

    async def call(self, service: str, name: str, request: dict[str, Any]) -> list[dict]:
        """The answers to a request, both as JSON has them."""
        method = await self.method(service, name)
        message = json_format.ParseDict(request, GetMessageClass(method.input_type)())
        answer_type = GetMessageClass(method.output_type)
        kind = "stream" if method.client_streaming else "unary"
        kind += "_stream" if method.server_streaming else "_unary"
        call = getattr(self._channel, kind)(
            f"/{service}/{name}",
            request_serializer=lambda m: m.SerializeToString(),
            response_deserializer=answer_type.FromString,
        )(iter([message]) if method.client_streaming else message)
        answers = [a async for a in call] if method.server_streaming else [await call]
        return [json_format.MessageToDict(answer) for answer in answers]

    async def _ask(self, **request: Any) -> Any:
        async def one() -> AsyncIterator[Any]:
            yield rpb.ServerReflectionRequest(**request)

        [answer] = [answer async for answer in self._stub.ServerReflectionInfo(one())]
        assert not answer.HasField("error_response"), answer
        return answer

    async def _load(self, **request: str) -> None:
        """Fetch a file and all that it depends on."""
        answer = await self._ask(**request)
        found = [
            FileDescriptorProto.FromString(data)
            for data in answer.file_descriptor_response.file_descriptor_proto
        ]
        for file in sorted(found, key=lambda f: len(f.dependency)):
            if file.name in self._files:
                continue
            for dependency in file.dependency:
                if dependency not in self._files:
                    await self._load(file_by_filename=dependency)
            self._pool.Add(file)
            self._files.add(file.name)


CALLS = {
    "jaxserve.v1.Jaxserve": (
        "Generate",
        {"text": "hi", "samplingParams": {"temperature": 0, "maxTokens": 3, "logitBias": {"7": 1}}},
    ),
    "inference.GRPCInferenceService": (
        "ModelInfer",
        {
            "modelName": "fake",
            "parameters": {"max_tokens": {"int64Param": 3}},
            "inputs": [
                {"name": "text_input", "datatype": "BYTES", "shape": [1],
                 "contents": {"bytesContents": ["aGk="]}}
            ],
        },
    ),
    "vllm.grpc.engine.VllmEngine": (
        "Generate", {"tokenized": {"inputIds": [1, 2]}, "samplingParams": {"maxTokens": 3}},
    ),
    "grpc.health.v1.Health": ("Check", {"service": "vllm.grpc.engine.VllmEngine"}),
}  # fmt: skip


def test_every_service_can_be_described_and_called(make_engine, serving) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            curl = Curl(s.channel)
            services = set(await curl.services())
            assert services == {*CALLS, "grpc.reflection.v1alpha.ServerReflection"}
            answers = {service: await curl.call(service, *call) for service, call in CALLS.items()}
            assert answers["jaxserve.v1.Jaxserve"][-1]["usage"]["completionTokens"] == 3
            [inferred] = answers["inference.GRPCInferenceService"]
            assert inferred["outputs"][0]["name"] == "text_output"
            [complete] = answers["vllm.grpc.engine.VllmEngine"]
            assert len(complete["complete"]["outputIds"]) == 3
            assert answers["grpc.health.v1.Health"] == [{"status": "SERVING"}]

    asyncio.run(main())


@pytest.mark.parametrize("service", [s for s in CALLS if not s.startswith("grpc.")])
def test_every_method_of_a_service_has_a_handler(serving, service: str) -> None:
    """Before there is an engine all methods answer: none is left to gRPC's UNIMPLEMENTED."""

    async def main() -> None:
        async with serving(None) as s:
            curl = Curl(s.channel)
            for method in await curl.methods(service):
                try:
                    await curl.call(service, method.name, {})
                except grpc.aio.AioRpcError as error:
                    own = "not offered" in (error.details() or "")
                    assert own or error.code() in (
                        grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INVALID_ARGUMENT,
                    ), f"{method.full_name}: {error}"  # fmt: skip

    asyncio.run(main())
