"""TLS and API keys on the gRPC port."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from jaxserve.server.context import ServerContext
from jaxserve.server.security.keys import ApiKeys
from jaxserve.server.security.tls import Tls
from jaxserve.server.server import GrpcServer, ServerOptions
from jaxserve.server.v1 import jaxserve_pb2 as pb
from tests.waiting import PATIENCE

CODES = grpc.StatusCode
ACME = (("authorization", "Bearer acme-key-0123456789"),)
GLOBEX = (("authorization", "Bearer globex-key-0123456789"),)


async def health_over(server: GrpcServer, credentials: grpc.ChannelCredentials | None) -> int:
    """The health status, or the error of who is not let in."""
    address = f"localhost:{server.port}"
    channel = (
        grpc.aio.insecure_channel(address)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials)
    )
    async with channel:
        request = health_pb2.HealthCheckRequest()
        stub: Any = health_pb2_grpc.HealthStub(channel)  # it has no types
        return (await stub.Check(request, timeout=5)).status


async def refused(server: GrpcServer, credentials: grpc.ChannelCredentials | None) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health_over(server, credentials)
    assert caught.value.code() is CODES.UNAVAILABLE


def client(ca: Path, own: Path | None = None) -> grpc.ChannelCredentials:
    pem = own.read_bytes() if own else None
    return grpc.ssl_channel_credentials(ca.read_bytes(), pem, pem)


def with_server(tls: Tls, main: Callable) -> None:
    async def run() -> None:
        server = GrpcServer(ServerOptions(port=0, host="localhost", tls=tls))
        await server.start()
        try:
            await main(server)
        finally:
            await server.stop(0)

    asyncio.run(run())


def test_tls(certificates) -> None:
    async def main(server: GrpcServer) -> None:
        assert await health_over(server, client(certificates.ca)) == 2
        await refused(server, client(certificates.strange_ca))
        await refused(server, None)

    with_server(certificates.tls, main)


def test_mutual_tls(certificates) -> None:
    async def main(server: GrpcServer) -> None:
        assert await health_over(server, client(certificates.ca, certificates.client)) == 2
        await refused(server, client(certificates.ca))
        await refused(server, client(certificates.ca, certificates.stranger))

    with_server(certificates.mutual, main)


@pytest.mark.parametrize("tls", [True, False])
@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01"])
def test_a_handshake_that_does_not_come_is_cut_off(certificates, tls: bool, sent: bytes) -> None:
    async def main() -> None:
        files = certificates.tls if tls else None
        server = GrpcServer(ServerOptions(port=0, read_timeout=0.2, tls=files))
        await server.start()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(sent)
            async with asyncio.timeout(PATIENCE):
                await reader.read()  # if anything, an alert or a settings frame
            writer.close()
        finally:
            await server.stop(0)

    asyncio.run(main())


@pytest.fixture
def keyed(make_engine, serving, keys_file):
    """`keyed(main, acme="limits", **engine options)`: main(serving, engine) with keys on."""

    def run(main: Callable, acme: str = "", **options: Any) -> None:
        async def go() -> None:
            engine = make_engine(**options)
            context = ServerContext(keys=ApiKeys(keys_file(acme)))
            async with serving(engine, context=context) as s:
                await main(s, engine)

        asyncio.run(go())

    return run


async def refusal(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            _ = [message async for message in call]
        else:
            await call
    return caught.value.code(), caught.value.details() or ""


def test_every_call_but_health_needs_a_key(keyed, make_request) -> None:
    async def main(s, engine) -> None:
        assert await s.health() == "SERVING"
        watch = s.health_stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == 1
        watch.cancel()
        reflection_stub: Any = reflection_pb2_grpc.ServerReflectionStub(s.channel)
        reflect = reflection_stub.ServerReflectionInfo
        for metadata in (None, (("authorization", "Bearer no-such-key-01234567"),)):
            for call in (
                s.stub.Generate(make_request(), metadata=metadata),
                s.stub.Abort(pb.AbortRequest(request_id="a"), metadata=metadata),
                s.stub.Tokenize(pb.TokenizeRequest(text="a"), metadata=metadata),
                s.stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata),
                s.stub.GetLoad(pb.GetLoadRequest(), metadata=metadata),
                reflect(iter([]), metadata=metadata),
                s.channel.unary_unary("/no.such.Service/Method")(b"", metadata=metadata),
            ):
                code, _ = await refusal(call)
                assert code is CODES.UNAUTHENTICATED
        assert engine.load().num_prompt_tokens == 0
        assert (await s.stub.GetLoad(pb.GetLoadRequest(), metadata=ACME)).num_total_pages
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = await reflect(iter([listing]), metadata=ACME).read()
        assert answer.list_services_response.service

    keyed(main)


def test_a_key_stands_for_its_tenant(keyed, make_request) -> None:
    tenants = []

    async def main(s, engine) -> None:
        original = engine.generate

        def generate(request_id, prompt, params, service):
            tenants.append(service.tenant)
            return original(request_id, prompt, params, service)

        engine.generate = generate
        for tenant in ("", "acme"):
            request = make_request(service_params=pb.ServiceParams(tenant=tenant))
            assert [m async for m in s.stub.Generate(request, metadata=ACME)]
        request = make_request(service_params=pb.ServiceParams(tenant="globex"))
        code, _ = await refusal(s.stub.Generate(request, metadata=ACME))
        assert code is CODES.PERMISSION_DENIED
        assert tenants == ["acme", "acme"]

    keyed(main)


def test_nobody_stops_another_tenants_request(keyed, make_request, wait_for, wait_idle) -> None:
    async def main(s, engine) -> None:
        call = s.stub.Generate(make_request(max_tokens=400, request_id="mine"), metadata=ACME)
        await call.read()
        abort = pb.AbortRequest(request_id="mine")
        assert not (await s.stub.Abort(abort, metadata=GLOBEX)).aborted
        await call.read()
        await asyncio.sleep(0.02)
        assert engine.load().num_running == 1
        assert (await s.stub.Abort(abort, metadata=ACME)).aborted
        while not (message := await call.read()).finish_reason:
            pass
        assert message.finish_reason == pb.FINISH_REASON_ABORT
        await wait_idle(engine)

    keyed(main, step_seconds=0.005)


def test_a_tenant_over_its_limits_is_told_when_to_come_back(keyed, make_request) -> None:
    async def main(s, engine) -> None:
        first = s.stub.Generate(make_request(max_tokens=400), metadata=ACME)
        await first.read()
        second = s.stub.Generate(make_request(), metadata=ACME)
        code, details = await refusal(second)
        assert code is CODES.RESOURCE_EXHAUSTED and "1 requests at a time" in details
        assert int(dict(await second.trailing_metadata())["retry-after"]) >= 1
        assert [m async for m in s.stub.Generate(make_request(), metadata=GLOBEX)]
        first.cancel()
        async with asyncio.timeout(PATIENCE):
            while engine.load().num_running:
                await asyncio.sleep(0.005)
        assert [m async for m in s.stub.Generate(make_request(), metadata=ACME)]
        code, details = await refusal(s.stub.Generate(make_request(), metadata=ACME))
        assert code is CODES.RESOURCE_EXHAUSTED and "2 requests per minute" in details

    keyed(main, "max_concurrent_requests = 1\nrequests_per_minute = 2", step_seconds=0.005)


def test_tenants_share_no_cached_pages(keyed, make_request) -> None:
    async def main(s, engine) -> None:
        for metadata, cached in ((ACME, False), (ACME, True), (GLOBEX, False)):
            request = make_request(ids=list(range(64)))
            answer = [m async for m in s.stub.Generate(request, metadata=metadata)]
            assert (answer[-1].usage.cached_tokens > 0) is cached

    keyed(main)
