"""The Open Inference Protocol over a channel, as its clients use it."""

import asyncio
import json
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from jaxserve.server.kserve import open_inference_pb2 as pb
from jaxserve.server.kserve import open_inference_pb2_grpc
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

CODES = grpc.StatusCode


def stub_of(serving: Any) -> Any:
    return open_inference_pb2_grpc.GRPCInferenceServiceStub(serving.channel)


def tensor(name: str, datatype: str, *values: Any, **fields: Any) -> Any:
    kind = {"BYTES": "bytes_contents", "BOOL": "bool_contents"}[datatype]
    return pb.ModelInferRequest.InferInputTensor(
        name=name, datatype=datatype,
        **{"shape": [len(values)], "contents": {kind: values}, **fields},
    )  # fmt: skip


def request(*texts: str, raw: bool = False, **fields: Any) -> pb.ModelInferRequest:
    parameters: dict[str, Any] = {
        "temperature": pb.InferParameter(double_param=0),
        "max_tokens": pb.InferParameter(int64_param=8),
    }
    data = [text.encode() for text in texts]
    if raw:
        inputs = [tensor("text_input", "BYTES", shape=[len(data)], contents=None)]
        fields["raw_input_contents"] = [b"".join(struct.pack("<I", len(d)) + d for d in data)]
    else:
        inputs = [tensor("text_input", "BYTES", *data)]
    return pb.ModelInferRequest(
        **{"model_name": "fake", "inputs": inputs, "parameters": parameters, **fields}
    )


def outputs(response: pb.ModelInferResponse) -> dict[str, list[Any]]:
    """Elements by output, whichever representation they came in."""
    found: dict[str, list[Any]] = {}
    for i, output in enumerate(response.outputs):
        if response.raw_output_contents:
            data = response.raw_output_contents[i]
            is_text = output.datatype == "BYTES"
            found[output.name] = list(split(data) if is_text else memoryview(data).cast("I"))
        elif output.datatype == "BYTES":
            found[output.name] = list(output.contents.bytes_contents)
        else:
            found[output.name] = list(output.contents.uint_contents)
    return found


def split(data: bytes) -> Iterator[bytes]:
    while data:
        size = int.from_bytes(data[:4], "little")
        yield data[4 : 4 + size]
        data = data[4 + size :]


@pytest.fixture
def answer(expected: Any) -> Any:
    """The greedy answer's text to a text."""

    def text_of(text: str, max_tokens: int = 8) -> str:
        tokenizer = ByteTokenizer()
        return tokenizer.decode(expected(tokenizer.encode(text), max_tokens))

    return text_of


def test_health_and_metadata_from_warming_up_to_draining(make_engine, serving) -> None:
    async def main() -> None:
        async with serving(None) as s:
            stub = stub_of(s)
            assert (await stub.ServerLive(pb.ServerLiveRequest())).live
            for ready in (False, True):
                assert (await stub.ServerReady(pb.ServerReadyRequest())).ready is ready
                assert (await stub.ModelReady(pb.ModelReadyRequest(name="fake"))).ready is ready
                assert await s.health("inference.GRPCInferenceService") == (
                    "SERVING" if ready else "NOT_SERVING"
                )
                if not ready:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await stub.ModelInfer(request("x"))
                    assert caught.value.code() is CODES.UNAVAILABLE
                    await s.server.attach(make_engine())
            about = await stub.ServerMetadata(pb.ServerMetadataRequest())
            assert about.name == "jaxserve" and about.version
            model = await stub.ModelMetadata(pb.ModelMetadataRequest(name="fake", version="1"))
            assert model.inputs[0] == pb.ModelMetadataResponse.TensorMetadata(
                name="text_input", datatype="BYTES", shape=[-1]
            )
            assert {o.name for o in model.outputs} >= {"text_output", "finish_reason"}
            for name, version in (("other", ""), ("fake", "2")):
                for call in (
                    stub.ModelReady(pb.ModelReadyRequest(name=name, version=version)),
                    stub.ModelMetadata(pb.ModelMetadataRequest(name=name, version=version)),
                    stub.ModelInfer(request("x", model_name=name, model_version=version)),
                ):
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await call
                    assert caught.value.code() is CODES.NOT_FOUND
            await s.server.drain()
            assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
            assert (await stub.ServerLive(pb.ServerLiveRequest())).live

    asyncio.run(main())


@pytest.mark.parametrize("raw", [False, True])
def test_texts_in_one_tensor_are_answered_in_their_order(
    make_engine, serving, wait_idle, answer, raw: bool
) -> None:
    texts = ["one", "zwölf", "three"]

    async def main() -> None:
        engine = make_engine()
        async with serving(engine) as s:
            response = await stub_of(s).ModelInfer(request(*texts, raw=raw, id="mine"))
            assert (response.model_name, response.id) == ("fake", "mine")
            assert bool(response.raw_output_contents) is raw
            assert all(list(o.shape) == [3] for o in response.outputs)
            got = outputs(response)
            assert got["text_output"] == [answer(text).encode() for text in texts]
            assert got["finish_reason"] == [b"length"] * 3
            assert got["num_input_tokens"] == [1 + len(text.encode()) for text in texts]
            assert got["num_output_tokens"] == [8] * 3
            await wait_idle(engine)

    asyncio.run(main())


def test_json_parameters_shape_and_outputs_asked_for(make_engine, serving, answer) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            sampling = json.dumps({"temperature": "0", "max_tokens": 20, "stop": ["\n\n\n", "#"]})
            asked = request(
                "hi",
                inputs=[
                    tensor("text_input", "BYTES", b"hi", shape=[1, 1]),
                    tensor("sampling_parameters", "BYTES", sampling.encode()),
                    tensor("stream", "BOOL", False),
                ],
                outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="text_output")],
                parameters={},
            )
            response = await stub_of(s).ModelInfer(asked)
            [output] = response.outputs
            assert (output.name, list(output.shape)) == ("text_output", [1, 1])
            text = answer("hi", 20)
            for stop in ("\n\n\n", "#"):
                text = text.split(stop)[0]
            assert outputs(response)["text_output"] == [text.encode()]

    asyncio.run(main())


def wanted(name: str, **parameters: Any) -> dict[str, Any]:
    output = pb.ModelInferRequest.InferRequestedOutputTensor(name=name, parameters=parameters)
    return {"outputs": [output]}


P = pb.InferParameter
BAD = {
    "no inputs": (request("x", inputs=[]), "text_input"),
    "no text": (request(""), "empty"),
    "not UTF-8": (request("x", inputs=[tensor("text_input", "BYTES", b"\xff")]), "UTF-8"),
    "many texts": (request(*["x"] * 2049), "2049"),
    "unknown parameter": (request("x", parameters={"beam_width": P(int64_param=4)}), "beam_width"),
    "bad value": (request("x", parameters={"top_p": P(double_param=7)}), "top_p"),
    "wrong kind": (request("x", parameters={"top_k": P(bool_param=True)}), "top_k"),
    "streaming": (
        request("x", inputs=[tensor("text_input", "BYTES", b"x"), tensor("stream", "BOOL", True)]),
        "ModelStreamInfer",
    ),
    "two flags": (
        request("x", inputs=[tensor("text_input", "BYTES", b"x"),
                             tensor("stream", "BOOL", False, False)]),
        "one element",
    ),
    "unknown output": (request("x", **wanted("logits")), "logits"),
    "output parameter": (
        request("x", **wanted("text_output", classification=P(int64_param=1))), "classification",
    ),
    "long id": (request("x", id="i" * 257), "id"),
    "prompt over the context": (request("x" * 600), "context"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_served_is_refused(make_engine, serving, wait_idle, case: str) -> None:
    bad, named = BAD[case]

    async def main() -> None:
        engine = make_engine()
        async with serving(engine) as s:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub_of(s).ModelInfer(bad)
            assert caught.value.code() is CODES.INVALID_ARGUMENT
            assert named in (caught.value.details() or "")
            await wait_idle(engine)

    asyncio.run(main())


def test_a_cancelled_call_frees_all_its_pages(make_engine, serving, wait_for, wait_idle) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.01)
        async with serving(engine) as s:
            asked = request("a", "b", "c", parameters={"max_tokens": P(int64_param=400)})
            call = stub_of(s).ModelInfer(asked)
            await wait_for(engine, lambda load: load.num_running == 3)
            call.cancel()
            await wait_idle(engine)
            assert engine.load().num_aborted == 3

    asyncio.run(main())


def streamed(text: str, request_id: str, **parameters: Any) -> pb.ModelInferRequest:
    asked = request(text, id=request_id)
    asked.inputs.append(tensor("stream", "BOOL", True))
    for name, value in parameters.items():
        asked.parameters[name].CopyFrom(value)
    return asked


def test_a_stream_answers_many_requests_in_pieces(make_engine, serving, wait_idle, answer) -> None:
    async def main() -> None:
        engine = make_engine()
        async with serving(engine) as s:
            asked = [
                streamed("one", "1"),
                streamed("two", "2", triton_enable_empty_final_response=P(bool_param=True)),
                request("three", id="3"),
                streamed("four", "4", beam_width=P(int64_param=4)),
            ]
            pieces: dict[str, list[pb.ModelInferResponse]] = {}
            async for message in stub_of(s).ModelStreamInfer(iter(asked)):
                if message.error_message:
                    assert "INVALID_ARGUMENT" in message.error_message
                    assert "beam_width" in message.error_message
                    assert message.infer_response.id == "4"
                else:
                    pieces.setdefault(message.infer_response.id, []).append(message.infer_response)
            assert sorted(pieces) == ["1", "2", "3"] and len(pieces["3"]) == 1
            assert not pieces["2"][-1].outputs  # the empty one that was asked for
            for request_id, text in zip("123", ("one", "two", "three"), strict=True):
                got = [outputs(piece) for piece in pieces[request_id] if piece.outputs]
                joined = b"".join(piece["text_output"][0] for piece in got)
                assert joined == answer(text).encode()
                assert got[-1]["finish_reason"] == [b"length"]
                final = [p.parameters["triton_final_response"].bool_param
                         for p in pieces[request_id]]  # fmt: skip
                assert final == [False] * (len(final) - 1) + [True]
            await wait_idle(engine)

    asyncio.run(main())


def test_a_cancelled_stream_frees_all_its_pages(make_engine, serving, wait_for, wait_idle) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.01)
        async with serving(engine) as s:
            asked = [streamed("x", str(i), max_tokens=P(int64_param=400)) for i in range(4)]
            call = stub_of(s).ModelStreamInfer(iter(asked))
            await wait_for(engine, lambda load: load.num_running == 4)
            call.cancel()
            await wait_idle(engine)
            assert engine.load().num_aborted == 4

    asyncio.run(main())


def test_a_stream_that_does_not_parse_ends_with_a_status(make_engine, serving) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            raw = s.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
            for data in (b"\x0a\x01\xc3", b"\xf8\x06\x01"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    _ = [message async for message in raw(iter([data]))]
                assert caught.value.code() is CODES.INVALID_ARGUMENT

    asyncio.run(main())


def test_what_tritons_clients_ask_first(make_engine, serving) -> None:
    async def main() -> None:
        async with serving(None) as s:
            stub = stub_of(s)
            assert not (await stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
            await s.server.attach(make_engine())
            [model] = (await stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))).models
            assert (model.name, model.version, model.state) == ("fake", "1", "READY")
            config = (await stub.ModelConfig(pb.ModelConfigRequest(name="fake"))).config
            about = await stub.ModelMetadata(pb.ModelMetadataRequest(name="fake"))
            assert config.name == "fake" and config.model_transaction_policy.decoupled
            assert [i.name for i in config.input] == [i.name for i in about.inputs]
            assert [list(i.dims) for i in config.input] == [list(i.shape) for i in about.inputs]
            assert [i.optional for i in config.input] == [False, True, True]
            assert [o.name for o in config.output] == [o.name for o in about.outputs]
            assert config.input[0].data_type == pb.TYPE_STRING
            assert config.parameters["max_model_len"].string_value.isdigit()
            [before] = (await stub.ModelStatistics(pb.ModelStatisticsRequest())).model_stats
            assert before.inference_count == before.last_inference == 0
            await stub.ModelInfer(request("one", "two"))
            [after] = (await stub.ModelStatistics(pb.ModelStatisticsRequest())).model_stats
            assert (after.name, after.version, after.inference_count) == ("fake", "1", 2)
            assert after.execution_count >= 8 and after.last_inference > 1.7e12
            counted = after.inference_stats
            assert counted.success.count == counted.queue.count == 2 and not counted.fail.count
            assert counted.success.ns >= counted.compute_infer.ns > 0
            for call, code in (
                (stub.ModelConfig(pb.ModelConfigRequest(name="other")), CODES.NOT_FOUND),
                (stub.ModelStatistics(pb.ModelStatisticsRequest(version="2")), CODES.NOT_FOUND),
                (stub.RepositoryIndex(pb.RepositoryIndexRequest(repository_name="a")),
                 CODES.INVALID_ARGUMENT),
            ):  # fmt: skip
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is code
            await s.server.drain()
            [model] = (await stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
            assert model.state == "UNAVAILABLE" and model.reason
            assert not (await stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))).models

    asyncio.run(main())
