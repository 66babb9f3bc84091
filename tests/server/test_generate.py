"""Answers and refusals, call by call."""

import asyncio

import grpc
import pytest

from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def test_a_stream_brings_the_tokens_and_ends_with_reason_and_usage(
    make_engine, serving, make_request, expected
) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            messages = await s.ask(make_request([9, 8, 7], max_tokens=20, request_id="mine"))
        assert len(messages) > 1
        assert [t for m in messages for t in m.token_ids] == expected([9, 8, 7], 20)
        assert {m.request_id for m in messages} == {"mine"}
        assert all(not m.finish_reason and not m.HasField("usage") for m in messages[:-1])
        assert messages[-1].finish_reason == pb.FINISH_REASON_LENGTH
        assert messages[-1].usage == pb.Usage(prompt_tokens=3, completion_tokens=20)
        answer = ByteTokenizer().decode(expected([9, 8, 7], 20))
        assert "".join(m.text for m in messages) == answer

    asyncio.run(main())


def test_text_and_chat_prompts_are_tokenized_as_tokenize_says(
    make_engine, serving, make_request, expected
) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Grüße")])
            for request in (make_request(text="Grüße"), make_request(chat=chat)):
                kind = request.WhichOneof("prompt")
                question = pb.TokenizeRequest(**{kind: getattr(request, kind)})
                tokenized = await s.stub.Tokenize(question)
                ids = list(tokenized.token_ids)
                assert tokenized.max_model_len == 512
                answer = [t for m in await s.ask(request) for t in m.token_ids]
                assert answer == expected(ids, 8)

    asyncio.run(main())


def test_unset_max_tokens_is_256_and_the_context_cuts_it(
    make_engine, serving, make_request
) -> None:
    async def main() -> None:
        async with serving(make_engine(step_seconds=0)) as s:
            for length, answered in ((10, 256), (500, 12)):
                request = make_request([1] * length)
                request.sampling_params.ClearField("max_tokens")
                last = (await s.ask(request))[-1]
                assert last.usage.completion_tokens == answered
                assert last.finish_reason == pb.FINISH_REASON_LENGTH

    asyncio.run(main())


def test_stop_tokens_and_stop_strings_end_with_reason_stop(
    make_engine, serving, make_request, expected
) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            answer = expected([4, 2], 20)
            request = make_request([4, 2], max_tokens=20)
            request.sampling_params.stop_token_ids.append(answer[10])
            messages = await s.ask(request)
            end = answer.index(answer[10]) + 1
            assert [t for m in messages for t in m.token_ids] == answer[:end]
            assert messages[-1].finish_reason == pb.FINISH_REASON_STOP

    asyncio.run(main())


BAD_REQUESTS = {
    "no prompt": (pb.GenerateRequest(), INVALID),
    "empty text": (pb.GenerateRequest(text=""), INVALID),
    "empty ids": (pb.GenerateRequest(token_ids=pb.TokenIds()), INVALID),
    "id beyond the vocabulary": (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 258])), INVALID,
    ),
    "huge id": (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1])), INVALID),
    "prompt as long as the context": (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 512)), INVALID,
    ),
    "100k tokens": (pb.GenerateRequest(text="x" * 100_000), INVALID),
    "negative max_tokens": (
        pb.GenerateRequest(text="x", sampling_params={"max_tokens": -1}), INVALID,
    ),
    "top_p -1": (pb.GenerateRequest(text="x", sampling_params={"top_p": -1.0}), INVALID),
    "long request id": (pb.GenerateRequest(text="x", request_id="i" * 1000), INVALID),
    "unknown model": (
        pb.GenerateRequest(text="x", model="gpt"), grpc.StatusCode.NOT_FOUND,
    ),
    "unknown model with a huge name": (
        pb.GenerateRequest(text="x", model="ü" * 10**6), grpc.StatusCode.NOT_FOUND,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests_get_their_status(make_engine, serving, wait_idle, case: str) -> None:
    async def main() -> None:
        request, status = BAD_REQUESTS[case]
        engine = make_engine()
        async with serving(engine) as s:
            code, details = await s.refusal(request)
            assert code is status and details
            assert "internal" not in details
            await wait_idle(engine)
            assert engine.load().num_steps == 0

    asyncio.run(main())


def test_a_full_queue_is_resource_exhausted(make_engine, serving, make_request, wait_for) -> None:
    async def main() -> None:
        engine = make_engine(max_num_seqs=1, max_waiting=1, step_seconds=0.01)
        async with serving(engine) as s:
            running = asyncio.create_task(s.ask(make_request(max_tokens=50)))
            await wait_for(engine, lambda load: load.num_running == 1)
            waiting = asyncio.create_task(s.ask(make_request()))
            await wait_for(engine, lambda load: load.num_waiting == 1)
            code, _ = await s.refusal(make_request())
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (await running)[-1].finish_reason and (await waiting)[-1].finish_reason

    asyncio.run(main())


def test_a_request_id_in_use_is_refused_and_free_again_later(
    make_engine, serving, make_request, wait_for
) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.005)
        async with serving(engine) as s:
            first = asyncio.create_task(s.ask(make_request(max_tokens=40, request_id="same")))
            await wait_for(engine, lambda load: load.num_running == 1)
            code, details = await s.refusal(make_request(request_id="same"))
            assert code is INVALID and "same" in details
            last = (await first)[-1]  # the refused one did not disturb the first
            assert last.usage.completion_tokens == 40
            assert (await s.ask(make_request(request_id="same")))[-1].finish_reason

    asyncio.run(main())


def test_abort_ends_another_callers_stream(make_engine, serving, make_request, wait_idle) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.005)
        async with serving(engine) as s:
            call = s.stub.Generate(make_request(max_tokens=400, request_id="victim"))
            await anext(aiter(call))
            assert (await s.stub.Abort(pb.AbortRequest(request_id="victim"))).aborted
            messages = [message async for message in call]
            assert messages[-1].finish_reason == pb.FINISH_REASON_ABORT
            assert await call.code() is grpc.StatusCode.OK
            assert not (await s.stub.Abort(pb.AbortRequest(request_id="victim"))).aborted
            await wait_idle(engine)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await s.stub.Abort(pb.AbortRequest())
            assert caught.value.code() is INVALID

    asyncio.run(main())


def test_model_info_and_load(make_engine, serving, make_request) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            info = await s.stub.GetModelInfo(pb.GetModelInfoRequest(model="fake"))
            assert (info.name, info.vocab_size, info.page_size) == ("fake", 258, 4)
            assert (info.dtype, info.kv_cache_dtype) == ("int32", "none")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await s.stub.GetModelInfo(pb.GetModelInfoRequest(model="other"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            await s.ask(make_request([1, 2, 3], max_tokens=5))
            load = await s.stub.GetLoad(pb.GetLoadRequest())
            assert (load.num_prompt_tokens, load.num_generated_tokens) == (3, 5)
            assert (load.num_finished, load.num_aborted) == (1, 0)

    asyncio.run(main())


def test_a_bug_is_internal_and_tells_the_client_nothing(
    make_engine, serving, make_request, monkeypatch, caplog
) -> None:
    def bug(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("jaxserve.server.v1.servicer.sampling_params", bug)

    async def main() -> None:
        async with serving(make_engine()) as s:
            code, details = await s.refusal(make_request())
            assert code is grpc.StatusCode.INTERNAL and "secret" not in details

    asyncio.run(main())
    assert "secret" in caplog.text
