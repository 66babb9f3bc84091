"""Several answers to one prompt, their log-probabilities, and who ends them."""

import asyncio

import grpc
import pytest

from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.testing.fake_engine import fake_engine
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def tokens_of(messages: list[pb.GenerateResponse], index: int) -> list[int]:
    return [t for m in messages if m.index == index for t in m.token_ids]


def test_answer_i_is_that_of_seed_plus_i(make_engine, serving, make_request, wait_idle) -> None:
    async def main() -> None:
        engine = make_engine()
        async with serving(engine) as s:

            def ask(seed: int, **fields: int) -> pb.GenerateRequest:
                request = make_request([1, 2, 3], max_tokens=12, **fields)
                request.sampling_params.temperature = 1
                request.sampling_params.seed = seed
                return request

            alone = [tokens_of(await s.ask(ask(7 + i)), 0) for i in range(3)]
            messages = await s.ask(ask(7, n=3))
            assert [tokens_of(messages, i) for i in range(3)] == alone
            assert len({tuple(answer) for answer in alone}) == 3
            last = [m for m in messages if m.finish_reason]
            assert sorted(m.index for m in last) == [0, 1, 2]
            assert all(m.usage.completion_tokens == 12 for m in last)
            assert len({m.request_id for m in messages}) == 1
            await wait_idle(engine)

    asyncio.run(main())


def test_abort_and_cancel_end_all_answers(
    make_engine, serving, make_request, wait_for, wait_idle
) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.005)
        async with serving(engine) as s:
            request = make_request(max_tokens=400, n=4, request_id="mine")
            call = s.stub.Generate(request)
            await wait_for(engine, lambda load: load.num_running == 4)
            assert (await s.stub.Abort(pb.AbortRequest(request_id="mine"))).aborted
            messages = [message async for message in call]
            assert [m.index for m in messages if m.finish_reason == pb.FINISH_REASON_ABORT]
            await wait_idle(engine)
            assert not (await s.stub.Abort(pb.AbortRequest(request_id="mine"))).aborted
            call = s.stub.Generate(request)
            await wait_for(engine, lambda load: load.num_running == 4)
            call.cancel()
            await wait_idle(engine)
            assert engine.load().num_aborted == 8

    asyncio.run(main())


@pytest.mark.parametrize("n", [0, 17, 2**32 - 1])
def test_n_out_of_range(make_engine, serving, make_request, n: int) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            code, details = await s.refusal(make_request(n=n))
            assert code is INVALID and details.startswith("n")

    asyncio.run(main())


def test_one_request_id_for_two_calls_with_several_answers(
    make_engine, serving, make_request, wait_for
) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.005)
        async with serving(engine) as s:
            request = make_request(max_tokens=30, n=2, request_id="same")
            first = asyncio.create_task(s.ask(request))
            await wait_for(engine, lambda load: load.num_running == 2)
            code, details = await s.refusal(request)
            assert code is INVALID and "same" in details
            assert [m.usage.completion_tokens for m in await first if m.finish_reason] == [30] * 2

    asyncio.run(main())


def test_logprobs_come_with_their_tokens(make_engine, serving, make_request) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            request = make_request(max_tokens=20)
            request.sampling_params.logprobs = 3
            messages = await s.ask(request)
            assert all([p.token_id for p in m.logprobs] == list(m.token_ids) for m in messages)
            assert all(len(p.top_ids) == 3 for m in messages for p in m.logprobs)

    asyncio.run(main())


def test_the_metadata_may_name_the_request(make_engine, serving, make_request) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            call = s.stub.Generate(make_request(), metadata=(("x-request-id", "theirs"),))
            assert {message.request_id async for message in call} == {"theirs"}

    asyncio.run(main())


def test_embed_takes_all_forms_of_a_prompt(make_engine, serving, wait_idle) -> None:
    async def main() -> None:
        engine = make_engine()
        async with serving(engine) as s:
            ids = ByteTokenizer().encode("hi")
            forms = [
                pb.EmbedRequest(text="hi", model="fake"),
                pb.EmbedRequest(token_ids=pb.TokenIds(ids=ids), request_id="mine"),
            ]
            embedded = [await s.stub.Embed(request) for request in forms]
            assert embedded[0] == embedded[1]
            assert sum(v * v for v in embedded[0].values) == pytest.approx(1, abs=1e-5)
            assert embedded[0].usage == pb.Usage(prompt_tokens=3)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await s.stub.Embed(pb.EmbedRequest())
            assert caught.value.code() is INVALID
            await wait_idle(engine)

    asyncio.run(main())


def test_a_cancelled_embedding_frees_its_pages(make_engine, serving, wait_for, wait_idle) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.1, max_num_batched_tokens=16)
        async with serving(engine) as s:
            call = s.stub.Embed(pb.EmbedRequest(token_ids=pb.TokenIds(ids=[1] * 500)))
            await wait_for(engine, lambda load: load.num_running == 1)
            call.cancel()
            await wait_idle(engine)
            assert engine.load().num_aborted == 1

    asyncio.run(main())


def test_prompt_logprobs_come_once(make_engine, serving, make_request) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            request = make_request([5, 6, 7], n=2)
            request.sampling_params.prompt_logprobs = 1
            messages = await s.ask(request)
            [first] = [m for m in messages if m.prompt_logprobs]
            assert first.index == 0
            assert [p.token_id for p in first.prompt_logprobs] == [6, 7]

    asyncio.run(main())


def test_a_grammar_holds(serving, make_request) -> None:
    engine = fake_engine()  # of a model that can end an answer

    async def main() -> None:
        async with serving(engine) as s:
            request = make_request(max_tokens=50)
            request.sampling_params.grammar.choice.options.extend(["yes", "no"])
            messages = await s.ask(request)
            assert "".join(m.text for m in messages) in ("yes", "no")
            request.sampling_params.grammar.regex = "("
            code, details = await s.refusal(request)
            assert code is INVALID and details

    try:
        asyncio.run(main())
    finally:
        engine.shutdown()
