"""gRPC streams that nobody reads wait, are cut off, and give back what they held."""

import asyncio

import grpc
import pytest

from tests.waiting import PATIENCE

OPTIONS = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]


def test_a_stream_that_nobody_reads_is_cut_off(
    make_engine, serving, make_request, wait_idle
) -> None:
    async def main() -> None:
        engine = make_engine(
            max_model_len=60_000, num_pages=20_000, step_seconds=0.0002, max_num_seqs=4
        )
        async with serving(engine, OPTIONS, write_timeout=0.5) as s:
            request = make_request(max_tokens=50_000)
            request.sampling_params.logprobs = 20
            stalled = s.stub.Generate(request)
            await stalled.read()
            other = grpc.aio.insecure_channel(s.server.address)
            async with other, asyncio.timeout(PATIENCE):
                while not s.server._streams.num_cut:
                    # Beside it, others are served.
                    messages = type(s.stub)(other).Generate(make_request(max_tokens=4))
                    assert [m async for m in messages][-1].finish_reason
            await wait_idle(engine)
            assert engine.load().num_aborted == 1
            assert not s.server._streams._open
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await stalled.read():
                    pass
                raise AssertionError("the stream looked complete")
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "has read nothing" in (caught.value.details() or "")

    asyncio.run(main())


def test_a_slow_device_is_no_standstill(make_engine, serving, make_request) -> None:
    async def main() -> None:
        async with serving(make_engine(step_seconds=0.1), write_timeout=0.05) as s:
            assert len(await s.ask(make_request(max_tokens=5))) == 5

    asyncio.run(main())
