"""vLLM's engine protocol over a channel, with the stubs that gateways are built from."""

import asyncio
import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import grpc
import pytest
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.engine.records import StepRecord
from jaxserve.server.vllm_grpc.facts import throughput
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer
from jaxserve.tokenizers.loading import load_tokenizer
from tests.waiting import PATIENCE

CODES = grpc.StatusCode


def stub_of(serving: Any) -> Any:
    return vllm_engine_pb2_grpc.VllmEngineStub(serving.channel)


def request(
    ids: list[int],
    max_tokens: int = 8,
    *,
    stream: bool = False,
    request_id: str = "",
    **params: Any,
) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=request_id,
        tokenized=pb.TokenizedInput(input_ids=ids, original_text="?"),
        # As the gateway sends them: defaults written out.
        sampling_params=pb.SamplingParams(
            **{"temperature": 0, "top_p": 1, "repetition_penalty": 1, "n": 1,
               "max_tokens": max_tokens, "skip_special_tokens": True,
               "spaces_between_special_tokens": True, **params}
        ),
        stream=stream,
    )  # fmt: skip


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            _ = [message async for message in call]
        else:
            await call
    return caught.value.code(), caught.value.details() or ""


def test_an_answer_in_one_message(make_engine, serving, expected, wait_idle) -> None:
    async def main() -> None:
        engine = make_engine()
        async with serving(engine) as s:
            [message] = [m async for m in stub_of(s).Generate(request([9, 8, 7], 20))]
            assert message.complete == pb.GenerateComplete(
                output_ids=expected([9, 8, 7], 20), finish_reason="length", prompt_tokens=3,
                completion_tokens=20,
            )  # fmt: skip
            text = pb.GenerateRequest(text="hi", sampling_params=request([1]).sampling_params)
            [message] = [m async for m in stub_of(s).Generate(text)]
            assert list(message.complete.output_ids) == expected(ByteTokenizer().encode("hi"), 8)
            await wait_idle(engine)

    asyncio.run(main())


def test_a_stream_has_chunks_and_then_the_whole(make_engine, serving, expected) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            asked = request([4, 2], 20, stream=True, logprobs=2)
            *chunks, last = [m async for m in stub_of(s).Generate(asked)]
            answer = expected([4, 2], 20)
            assert len(chunks) > 1 and all(m.HasField("chunk") for m in chunks)
            assert [t for m in chunks for t in m.chunk.token_ids] == answer
            assert sum(m.chunk.completion_tokens for m in chunks) == 20
            assert list(last.complete.output_ids) == answer
            assert last.complete.completion_tokens == 20
            for m in chunks:
                assert list(m.chunk.output_logprobs.token_ids) == list(m.chunk.token_ids)
                assert all(len(top.values) == 2 for top in m.chunk.output_logprobs.top_logprobs)
            assert not last.complete.HasField("output_logprobs")

    asyncio.run(main())


def test_several_answers_and_a_matched_stop(make_engine, serving, expected) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            asked = request([1, 2], 12, stream=True, n=3, temperature=1, seed=5)
            messages = [m async for m in stub_of(s).Generate(asked)]
            whole = {m.complete.index: list(m.complete.output_ids) for m in messages
                     if m.HasField("complete")}  # fmt: skip
            assert sorted(whole) == [0, 1, 2] and len({tuple(a) for a in whole.values()}) == 3
            for index, answer in whole.items():
                chunks = [m.chunk for m in messages if m.HasField("chunk")]
                assert [t for c in chunks if c.index == index for t in c.token_ids] == answer
            answer = expected([4, 2], 20)
            end = answer.index(answer[10])
            asked = request([4, 2], 20, stop_token_ids=[answer[10]], logprobs=0)
            [message] = [m async for m in stub_of(s).Generate(asked)]
            assert list(message.complete.output_ids) == answer[: end + 1]
            assert message.complete.finish_reason == "stop"
            assert list(message.complete.output_logprobs.token_ids) == answer[: end + 1]

    asyncio.run(main())


def test_abort_and_cancel_free_the_pages(make_engine, serving, wait_for, wait_idle) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.005)
        async with serving(engine) as s:
            stub = stub_of(s)
            calls = [
                stub.Generate(request([1], 400, request_id="one", n=2)),
                stub.Generate(request([2], 400, request_id="two")),
            ]
            await wait_for(engine, lambda load: load.num_running == 3)
            await stub.Abort(pb.AbortRequest(request_ids=["one", "two", "unknown"]))
            for call in calls:
                reasons = [m.complete.finish_reason async for m in call]
                assert set(reasons) == {"abort"}
            await wait_idle(engine)
            call = stub.Generate(request([1], 400, stream=True))
            await call.read()
            call.cancel()
            await wait_idle(engine)
            assert engine.load().num_aborted == 4

    asyncio.run(main())


def test_facts_and_health_from_warming_up_to_draining(make_engine, serving) -> None:
    async def main() -> None:
        async with serving(None) as s:
            stub = stub_of(s)
            for early in (
                stub.HealthCheck(pb.HealthCheckRequest()),
                stub.GetModelInfo(pb.GetModelInfoRequest()),
            ):
                code, details = await refusal(early)
                assert code is CODES.UNAVAILABLE and "warming up" in details
            await s.server.attach(make_engine(default_sampling_params={"top_k": 3}))
            assert await s.health("vllm.grpc.engine.VllmEngine") == "SERVING"
            assert (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
            info = await stub.GetModelInfo(pb.GetModelInfoRequest())
            assert (info.served_model_name, info.is_generation) == ("fake", True)
            assert (info.max_context_length, info.vocab_size) == (512, 258)
            assert (list(info.eos_token_ids), info.bos_token_id) == ([257], 256)
            assert json.loads(info.default_sampling_params_json) == {"top_k": 3}
            server = await stub.GetServerInfo(pb.GetServerInfoRequest())
            assert (server.block_size, server.max_num_seqs) == (4, 16)
            assert (server.model_dtype, server.kv_cache_dtype) == ("int32", "none")
            await s.server.drain()
            assert not (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
            code, _ = await refusal(stub.Generate(request([1])))
            assert code is CODES.UNAVAILABLE

    asyncio.run(main())


def test_loads(make_engine, serving, wait_for) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.005)
        async with serving(engine) as s:
            stub = stub_of(s)
            call = stub.Generate(request(list(range(20)), 400, stream=True))
            for _ in range(5):
                await call.read()
            asked = pb.GetLoadsRequest(dp_rank=0, include=["core", "queues"])
            response = await stub.GetLoads(asked)
            [load] = response.loads
            assert response.dp_rank_count == 1 and response.timestamp and response.version
            assert (load.num_running_reqs, load.num_waiting_reqs) == (1, 0)
            assert load.max_total_num_tokens == 2048 and 20 <= load.num_used_tokens <= 424
            assert 0 < load.token_usage < 1 and load.utilization >= 1 / 16
            assert load.gen_throughput > 0
            call.cancel()
            code, details = await refusal(stub.GetLoads(pb.GetLoadsRequest(dp_rank=1)))
            assert code is CODES.INVALID_ARGUMENT and "dp_rank" in details

    asyncio.run(main())


def test_throughput_is_of_the_last_ten_seconds() -> None:
    def step(launched: float, collected: float, tokens: int) -> StepRecord:
        return StepRecord(0, launched, collected, 0, 0, 0, 0, 0, 0, tokens, 0, 0, 0)

    assert throughput([], 100) == 0
    assert throughput([step(80, 89, 7)], 100) == 0
    assert throughput([step(80, 89, 7), step(89, 95, 30), step(95, 100, 20)], 100) == 5
    assert throughput([step(98, 99, 30)], 100) == 15


def test_the_tokenizer_arrives_as_an_archive(make_engine, serving, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            archives = []
            for _ in range(2):
                call = stub_of(s).GetTokenizer(common_pb2.GetTokenizerRequest())
                chunks = [chunk async for chunk in call]
                data = b"".join(chunk.data for chunk in chunks)
                assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
                assert not any(chunk.sha256 for chunk in chunks[:-1])
                archives.append(data)
            assert archives[0] == archives[1]
            zipfile.ZipFile(io.BytesIO(archives[0])).extractall(tmp_path)

    asyncio.run(main())
    assert (tmp_path / "tokenizer.json").exists()
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("Grüße <eos>") == ByteTokenizer().encode("Grüße <eos>")
    assert loaded.chat_template == ByteTokenizer().chat_template


def test_kv_events_tell_what_a_prompt_could_share(make_engine, serving) -> None:
    async def main() -> None:
        async with asyncio.timeout(PATIENCE), serving(make_engine(num_pages=16)) as s:
            stub = stub_of(s)
            call = stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest())
            await call.initial_metadata()
            _ = [m async for m in stub.Generate(request(list(range(10)), 4))]
            blocks: dict[int, tuple[list[int], int | None]] = {}
            number = 0
            while len(blocks) < 3:
                batch = await call.read()
                assert batch.sequence_number == number + 1
                number = batch.sequence_number
                for event in batch.events:
                    [block] = event.stored.blocks
                    has_parent = event.stored.HasField("parent_block_hash")
                    parent = event.stored.parent_block_hash if has_parent else None
                    blocks[block.block_hash] = (list(block.token_ids), parent)
            first, second, third = blocks
            assert blocks[first] == ([0, 1, 2, 3], None)
            assert blocks[second] == ([4, 5, 6, 7], first)
            assert blocks[third][1] == second
            _ = [m async for m in stub.Generate(request([200] * 60, 4))]  # evicts them
            removed: set[int] = set()
            while not {first, second, third} <= removed:
                for event in (await call.read()).events:
                    removed |= set(event.removed.block_hashes)
            await s.server.drain()
            assert not await call.read()  # the end

            code, _ = await refusal(
                stub.SubscribeKvEvents(
                    common_pb2.SubscribeKvEventsRequest(start_sequence_number=2**64 - 1)
                )
            )
            assert code is CODES.INVALID_ARGUMENT

    asyncio.run(main())


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        ("FlushCache", common_pb2.FlushCacheRequest()),
        ("StartProfile", common_pb2.StartProfileRequest()),
        ("StopProfile", common_pb2.StopProfileRequest()),
    ],
)
def test_what_is_not_offered_says_so(make_engine, serving, method: str, asked: Any) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            code, details = await refusal(getattr(stub_of(s), method)(asked))
            assert code is CODES.UNIMPLEMENTED and method in details

    asyncio.run(main())


def test_every_method_of_the_protocol_is_answered() -> None:
    from jaxserve.server.vllm_grpc.servicer import VllmEngineServicer

    service = pb.DESCRIPTOR.services_by_name["VllmEngine"]
    assert {method.name for method in service.methods} <= set(vars(VllmEngineServicer))


def test_embeddings_and_prompt_logprobs(make_engine, serving, wait_idle) -> None:
    async def main() -> None:
        engine = make_engine()
        async with serving(engine) as s:
            stub = stub_of(s)
            asked = pb.EmbedRequest(tokenized=pb.TokenizedInput(input_ids=[1, 2, 3]))
            answer = await stub.Embed(asked)
            assert answer.prompt_tokens == 3 and answer.embedding_dim == len(answer.embedding) > 0
            code, _ = await refusal(stub.Embed(pb.EmbedRequest()))
            assert code is CODES.INVALID_ARGUMENT
            for stream in (False, True):
                generate = request([5, 6, 7], prompt_logprobs=2, stream=stream)
                first, *_ = [m async for m in stub.Generate(generate)]
                told = (first.chunk if stream else first.complete).input_logprobs
                assert list(told.token_ids) == [5, 6, 7]
                assert [p.HasField("value") for p in told.token_logprobs] == [False, True, True]
                assert [len(top.token_ids) for top in told.top_logprobs] == [0, 2, 2]
            await wait_idle(engine)

    asyncio.run(main())
