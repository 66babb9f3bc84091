"""What the wire may bring: broken bytes, big messages, many pings, curious tools."""

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from jaxserve.server.server import GrpcServer, ServerOptions
from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.server.v1 import jaxserve_pb2_grpc


@pytest.mark.parametrize(
    "data",
    [
        b"\x1a\x02\xff\xfe",  # text that is not UTF-8
        b"\x0a\x01\xc3",  # a model name that is half a character
        b"\x1a\x7f\x41",  # a length beyond the end
        b"\xff" * 100,
        b"\xf8\x06\x01\x1a\x01x",  # a field of a newer protocol
    ],
)
def test_requests_that_do_not_parse_are_invalid_arguments(
    make_engine, serving, make_request, data: bytes
) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            raw = s.channel.unary_stream(
                "/jaxserve.v1.Jaxserve/Generate",
                request_serializer=bytes,
                response_deserializer=pb.GenerateResponse.FromString,
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [message async for message in raw(data)]
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            unary = s.channel.unary_unary("/jaxserve.v1.Jaxserve/Tokenize")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await unary(data)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert await s.ask(make_request())  # and life goes on

    asyncio.run(main())


def test_messages_over_the_limit_are_refused(make_engine, serving, make_request) -> None:
    async def main() -> None:
        async with serving(make_engine(), max_message_mib=0.5) as s:
            code, _ = await s.refusal(pb.GenerateRequest(text="x" * 600_000))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            code, _ = await s.refusal(pb.GenerateRequest(text="x" * 500_000))
            assert code is grpc.StatusCode.INVALID_ARGUMENT  # small enough to be looked at
            assert await s.ask(make_request())

    asyncio.run(main())


PING, GOAWAY = 6, 7  # HTTP/2 frame types


async def ping(address: str, count: int) -> int:
    """Send HTTP/2 pings on a bare connection; how many were answered before a GOAWAY.

    gRPC's own clients hold their pings back, and so cannot test this.
    """
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    answered = 0
    try:
        for number in range(count):
            writer.write(bytes([0, 0, 8, PING, 0, 0, 0, 0, 0]) + number.to_bytes(8))
            await writer.drain()
            while True:
                header = await asyncio.wait_for(reader.readexactly(9), 5)
                payload = await reader.readexactly(int.from_bytes(header[:3]))
                if header[3] == GOAWAY:
                    return answered
                if header[3] == PING and header[4] & 1 and payload == number.to_bytes(8):
                    answered += 1
                    break
    finally:
        writer.close()
    return answered


def test_a_client_that_pings_all_the_time_is_tolerated(make_engine, serving, make_request) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            assert await ping(s.server.address, 50) == 50
            assert await s.ask(make_request())

    asyncio.run(main())


def test_reflection_lists_the_services_and_describes_them(serving) -> None:
    async def main() -> None:
        async with serving(None) as s:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(s.channel)
            requests = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(
                    file_containing_symbol="jaxserve.v1.Jaxserve"
                ),
            ]
            listed, described = [
                answer async for answer in stub.ServerReflectionInfo(iter(requests))
            ]
            names = {service.name for service in listed.list_services_response.service}
            assert names == {
                "jaxserve.v1.Jaxserve",
                "inference.GRPCInferenceService",
                "vllm.grpc.engine.VllmEngine",
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
            }
            files = described.file_descriptor_response.file_descriptor_proto
            assert files[0] == pb.DESCRIPTOR.serialized_pb

    asyncio.run(main())


def test_interceptors_see_every_call_of_every_service(make_engine) -> None:
    class Guard(grpc.aio.ServerInterceptor):
        def __init__(self) -> None:
            self.methods: list[str] = []

        async def intercept_service(self, continuation: Any, details: Any) -> Any:
            self.methods.append(details.method)
            return await continuation(details)

    async def main() -> None:
        guard = Guard()
        server = GrpcServer(ServerOptions(port=0), interceptors=[guard])
        await server.start()
        await server.attach(make_engine())
        async with grpc.aio.insecure_channel(server.address) as channel:
            await jaxserve_pb2_grpc.JaxserveStub(channel).GetLoad(pb.GetLoadRequest())
            health: Any = health_pb2_grpc.HealthStub(channel)
            await health.Check(health_pb2.HealthCheckRequest())
        await server.stop(0)
        assert guard.methods == ["/jaxserve.v1.Jaxserve/GetLoad", "/grpc.health.v1.Health/Check"]

    asyncio.run(main())
