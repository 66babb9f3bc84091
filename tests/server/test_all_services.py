"""What holds for the services of every protocol: draining, API keys, traces."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2, vllm_engine_pb2_grpc

from jaxserve.server.context import ServerContext
from jaxserve.server.kserve import open_inference_pb2, open_inference_pb2_grpc
from jaxserve.server.security.keys import ApiKeys
from jaxserve.server.server import GrpcServer, ServerOptions
from jaxserve.server.v1 import jaxserve_pb2, jaxserve_pb2_grpc
from tests.waiting import PATIENCE

CODES = grpc.StatusCode
KEY = (("authorization", "Bearer acme-key-0123456789"),)
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

Ask = Callable[..., Any]  # (channel, max_tokens, metadata) -> the call


def ask_jaxserve(channel: Any, max_tokens: int, metadata: Any = None) -> Any:
    request = jaxserve_pb2.GenerateRequest(text="hi", sampling_params={"max_tokens": max_tokens})
    return jaxserve_pb2_grpc.JaxserveStub(channel).Generate(request, metadata=metadata)


def kserve_request(max_tokens: int) -> open_inference_pb2.ModelInferRequest:
    request = open_inference_pb2.ModelInferRequest(model_name="fake")
    request.parameters["max_tokens"].int64_param = max_tokens
    text = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(b"hi")
    return request


def ask_kserve(channel: Any, max_tokens: int, metadata: Any = None) -> Any:
    stub: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
    return stub.ModelInfer(kserve_request(max_tokens), metadata=metadata)


def ask_vllm(channel: Any, max_tokens: int, metadata: Any = None) -> Any:
    request = vllm_engine_pb2.GenerateRequest(text="hi", stream=True)
    request.sampling_params.max_tokens = max_tokens
    return vllm_engine_pb2_grpc.VllmEngineStub(channel).Generate(request, metadata=metadata)


ASK: dict[str, Ask] = {"jaxserve": ask_jaxserve, "kserve": ask_kserve, "vllm": ask_vllm}


async def finished(call: Any) -> grpc.StatusCode:
    """How a call ends, whichever kind it is."""
    try:
        if isinstance(call, grpc.aio.UnaryUnaryCall):
            await call
        else:
            _ = [message async for message in call]
    except grpc.aio.AioRpcError as error:
        return error.code()
    return CODES.OK


@pytest.mark.parametrize("protocol", ASK)
@pytest.mark.parametrize("grace", [10.0, 0.05])
def test_draining_lets_finish_or_says_that_it_did_not(
    make_engine, serving, wait_for, wait_idle, protocol: str, grace: float
) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.005)
        async with serving(engine, grace_period=grace) as s:
            tokens = 60 if grace > 1 else 400
            call = asyncio.ensure_future(finished(ASK[protocol](s.channel, tokens)))
            await wait_for(engine, lambda load: load.num_running == 1)
            draining = asyncio.ensure_future(s.server.drain())
            await wait_for(engine, lambda load: not engine.is_ready)
            assert await finished(ASK[protocol](s.channel, 1)) is CODES.UNAVAILABLE
            # An answer that was cut off is not taken for a whole one.
            assert await call is (CODES.OK if grace > 1 else CODES.UNAVAILABLE)
            await asyncio.wait_for(draining, 5)
            await wait_idle(engine)

    asyncio.run(main())


def test_a_trace_is_the_request_s_whatever_the_protocol(make_engine, serving) -> None:
    async def main() -> None:
        engine = make_engine()
        async with serving(engine) as s:
            for ask in ASK.values():
                assert await finished(ask(s.channel, 2, (("traceparent", TRACE),))) is CODES.OK
            records = engine.records.requests()
            assert [record.traceparent for record in records] == [TRACE] * len(ASK)

    asyncio.run(main())


def test_keys_are_asked_for_by_all_but_health(make_engine, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text('[tenants.acme]\nkeys = ["acme-key-0123456789"]\n')
    file.chmod(0o600)

    async def main() -> None:
        engine = make_engine()
        server = GrpcServer(ServerOptions(port=0), ServerContext(keys=ApiKeys(file)))
        await server.start()
        await server.attach(engine)
        try:
            async with grpc.aio.insecure_channel(server.address) as channel:
                for ask in ASK.values():
                    assert await finished(ask(channel, 2)) is CODES.UNAUTHENTICATED
                    assert await finished(ask(channel, 2, KEY)) is CODES.OK
                assert {r.tenant for r in engine.records.requests()} == {"acme"}
                kserve: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
                vllm: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
                await kserve.ServerLive(open_inference_pb2.ServerLiveRequest())
                await kserve.ServerReady(open_inference_pb2.ServerReadyRequest())
                await kserve.ModelReady(open_inference_pb2.ModelReadyRequest(name="fake"))
                await vllm.HealthCheck(vllm_engine_pb2.HealthCheckRequest())
                for call in (
                    kserve.ModelStreamInfer(iter([kserve_request(1)])),
                    vllm.GetTokenizer(common_pb2.GetTokenizerRequest()),
                    vllm.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest()),
                ):
                    assert await finished(call) is CODES.UNAUTHENTICATED
        finally:
            await server.stop(0)

    asyncio.run(main())


def test_a_tenant_is_told_of_its_own_pages_only(make_engine, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(
        '[tenants.acme]\nkeys = ["acme-key-0123456789"]\n'
        '[tenants.globex]\nkeys = ["globex-key-0123456789"]\n'
    )
    file.chmod(0o600)
    other = (("authorization", "Bearer globex-key-0123456789"),)

    async def generate(vllm: Any, first: int, metadata: Any) -> None:
        request = vllm_engine_pb2.GenerateRequest()
        request.tokenized.input_ids.extend(range(first, first + 8))
        request.sampling_params.max_tokens = 1
        assert await finished(vllm.Generate(request, metadata=metadata)) is CODES.OK

    async def main() -> None:
        server = GrpcServer(ServerOptions(port=0), ServerContext(keys=ApiKeys(file)))
        await server.start()
        await server.attach(make_engine())
        try:
            async with (
                asyncio.timeout(PATIENCE),
                grpc.aio.insecure_channel(server.address) as channel,
            ):
                vllm: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
                request = common_pb2.SubscribeKvEventsRequest()
                call = vllm.SubscribeKvEvents(request, metadata=KEY)
                await call.initial_metadata()
                await generate(vllm, 100, other)
                await generate(vllm, 0, KEY)
                told: list[int] = []
                while len(told) < 8:
                    batch = await call.read()
                    for event in batch.events:
                        told += event.stored.blocks[0].token_ids
                assert told == list(range(8))
                call.cancel()
        finally:
            await server.stop(0)

    asyncio.run(main())
