"""Whoever stops listening stops computing."""

import asyncio

import grpc
import pytest


def test_cancel_frees_the_pages_within_one_step(
    make_engine, serving, make_request, wait_for, wait_idle
) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.1)
        async with serving(engine) as s:
            call = s.stub.Generate(make_request(max_tokens=400))
            await call.read()
            await call.read()
            steps = engine.load().num_steps
            call.cancel()
            load = await wait_for(engine, lambda load: load.num_running == 0)
            assert load.num_used_pages == 0
            # the step under way, and the one that may end between our two looks
            assert load.num_steps - steps <= 2
            assert load.num_aborted == 1

    asyncio.run(main())


def test_a_passed_deadline_stops_the_request(make_engine, serving, make_request, wait_idle) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.01)
        async with serving(engine) as s:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await s.ask(make_request(max_tokens=400), timeout=0.2)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await wait_idle(engine)
            assert engine.load().num_aborted == 1
            assert engine.load().num_generated_tokens < 100

    asyncio.run(main())


def test_cancel_while_waiting_to_run(
    make_engine, serving, make_request, wait_for, wait_idle
) -> None:
    async def main() -> None:
        engine = make_engine(max_num_seqs=1, step_seconds=0.01)
        async with serving(engine) as s:
            first = asyncio.create_task(s.ask(make_request(max_tokens=60)))
            await wait_for(engine, lambda load: load.num_running == 1)
            second = s.stub.Generate(make_request(max_tokens=60))
            await wait_for(engine, lambda load: load.num_waiting == 1)
            second.cancel()
            await wait_for(engine, lambda load: load.num_waiting == 0)
            assert not first.done()
            assert (await first)[-1].usage.completion_tokens == 60
            await wait_idle(engine)

    asyncio.run(main())


def test_a_vanished_client_is_noticed_while_no_token_comes(
    make_engine, serving, make_request, wait_for, wait_idle
) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.5)
        async with serving(engine) as s:
            other = grpc.aio.insecure_channel(s.server.address)
            stub = type(s.stub)(other)
            calls = [stub.Generate(make_request(max_tokens=400)) for _ in range(4)]
            await wait_for(engine, lambda load: load.num_running == 4)
            await other.close()
            await wait_idle(engine)
            assert engine.load().num_aborted == len(calls)

    asyncio.run(main())


def test_a_client_that_does_not_read_is_aborted_on_cancel(
    make_engine, serving, make_request, wait_idle
) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.001)
        options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
        async with serving(engine, options) as s:
            calls = [s.stub.Generate(make_request(max_tokens=500)) for _ in range(4)]
            await asyncio.sleep(0.2)
            for call in calls:
                call.cancel()
            await wait_idle(engine)
            assert await s.server._context.wait_idle(2)

    asyncio.run(main())
