"""How long an answer may be: what is asked for fits or is refused, and there is a default."""

import asyncio
from typing import Any

import grpc
import httpx
import pytest

from jaxserve.server.context import ServerContext
from jaxserve.server.http.app import make_app
from jaxserve.server.http.server import HttpServer
from jaxserve.server.kserve import open_inference_pb2 as ks
from jaxserve.server.kserve import open_inference_pb2_grpc
from jaxserve.server.limits import RequestLimits
from jaxserve.server.server import ServerOptions
from jaxserve.server.v1 import jaxserve_pb2 as pb

CONTEXT = 64
MESSAGES = [{"role": "user", "content": "hi"}]  # 20 tokens
CASES = {
    "/v1/chat/completions": ({"messages": MESSAGES}, "max_tokens", 20),
    "/v1/completions": ({"prompt": "hi"}, "max_tokens", 3),
    "/v1/responses": ({"input": "hi"}, "max_output_tokens", 20),
}


def context_of(**limits: int) -> ServerContext:
    return ServerContext(RequestLimits(**limits))


def over_http(context: ServerContext, ask: Any) -> None:
    async def main() -> None:
        server = HttpServer(ServerOptions(http_port=0), make_app(context))
        await server.start()
        url = f"http://{server.address}"
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            await ask(client)
        await server.stop(0)

    asyncio.run(main())


def length_of(answer: httpx.Response) -> int:
    usage = answer.json()["usage"]
    return usage.get("completion_tokens", usage.get("output_tokens"))


@pytest.mark.parametrize("path", CASES)
def test_what_does_not_fit_is_refused_by_its_numbers(make_engine, path: str) -> None:
    body, name, prompt = CASES[path]
    context = context_of()
    context.engine = make_engine(max_model_len=CONTEXT)
    room = CONTEXT - prompt

    async def ask(client: httpx.AsyncClient) -> None:
        for stream in (False, True):
            fields = {**body, "stream": stream, "ignore_eos": True}
            refusal = await client.post(path, json={**fields, name: room + 1})
            error = refusal.json()["error"]
            assert refusal.status_code == 400 and error["param"] == name
            for number in (room + 1, CONTEXT, prompt, room):
                assert str(number) in error["message"]
        answer = await client.post(path, json={**body, "ignore_eos": True, name: room})
        assert length_of(answer) == room

    over_http(context, ask)


@pytest.mark.parametrize(("default", "length"), [(7, 7), (4096, CONTEXT - 20)])
def test_an_answer_that_is_not_asked_for_more_ends_at_the_default(
    make_engine, default: int, length: int
) -> None:
    context = context_of(default_max_tokens=default)
    context.engine = make_engine(max_model_len=CONTEXT)

    async def ask(client: httpx.AsyncClient) -> None:
        for path in ("/v1/chat/completions", "/v1/responses"):
            answer = await client.post(path, json={**CASES[path][0], "ignore_eos": True})
            assert length_of(answer) == length
        [model] = (await client.get("/v1/models")).json()["data"]
        assert model["default_sampling_params"]["max_tokens"] == default
        # A completion's is OpenAI's 16, which a long prompt leaves no room for either.
        body = {"prompt": [1] * 60, "ignore_eos": True}
        assert length_of(await client.post("/v1/completions", json=body)) == CONTEXT - 60

    over_http(context, ask)


def test_over_grpc(make_engine, serving) -> None:
    async def main() -> None:
        async with serving(make_engine(max_model_len=CONTEXT)) as s:
            stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(s.channel)
            for max_tokens, fits in ((61, True), (62, False), (None, True)):
                request = pb.GenerateRequest(text="hi", sampling_params={"ignore_eos": True})
                infer = ks.ModelInferRequest(model_name="fake")
                infer.inputs.add(
                    name="text_input", datatype="BYTES", shape=[1],
                    contents={"bytes_contents": [b"hi"]},
                )  # fmt: skip
                infer.parameters["ignore_eos"].bool_param = True
                if max_tokens is not None:
                    request.sampling_params.max_tokens = max_tokens
                    infer.parameters["max_tokens"].int64_param = max_tokens
                if fits:
                    last = (await s.ask(request))[-1]
                    assert last.usage.completion_tokens == CONTEXT - 3
                    outputs = (await stub.ModelInfer(infer)).outputs
                    assert outputs[3].contents.uint_contents == [CONTEXT - 3]
                    continue
                code, message = await s.refusal(request)
                assert code is grpc.StatusCode.INVALID_ARGUMENT and "leaves 61" in message
                with pytest.raises(grpc.aio.AioRpcError, match="leaves 61"):
                    await stub.ModelInfer(infer)

    asyncio.run(main())
