"""From an open port over ready and draining to the end."""

import asyncio
import re

import httpx
import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.server.context import ServerContext
from jaxserve.server.http.app import make_app
from jaxserve.server.http.server import HttpServer
from jaxserve.server.serve import serve
from jaxserve.server.server import ServerOptions

CHAT = "/v1/chat/completions"


def body(max_tokens: int = 8, **fields: object) -> dict[str, object]:
    messages = [{"role": "user", "content": "hi"}]
    return {"messages": messages, "temperature": 0, "max_tokens": max_tokens, **fields}


def test_before_and_after_the_engine_is_there(make_engine, serving) -> None:
    async def main() -> None:
        async with serving(None) as s:
            assert (await s.client.get("/health")).status_code == 503
            assert (await s.client.get("/version")).status_code == 200
            status, error = await s.refusal(CHAT, body())
            assert status == 503 and "warming up" in error["message"]
            s.context.engine = make_engine()
            assert (await s.client.get("/health")).status_code == 200
            assert (await s.post(CHAT, body())).status_code == 200

    asyncio.run(main())


def test_a_client_that_goes_away_frees_its_pages(make_engine, serving, wait_idle) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.01)
        async with serving(engine) as s:
            async with s.client.stream("POST", CHAT, json=body(400, stream=True)) as response:
                await anext(response.aiter_bytes())
                assert engine.load().num_running == 1
            await wait_idle(engine)
            with pytest.raises(httpx.ReadTimeout):
                await s.post(CHAT, body(400, n=3), timeout=0.3)
            await wait_idle(engine)
            load = engine.load()
            assert load.num_aborted == 4 and load.num_generated_tokens < 400
            assert await s.context.wait_idle(1)

    asyncio.run(main())


def test_draining_refuses_the_new_and_finishes_the_running(make_engine, serving) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.005)
        async with serving(engine) as s:
            running = asyncio.create_task(s.events(CHAT, body(100)))
            while not engine.load().num_running:
                await asyncio.sleep(0.002)
            draining = asyncio.create_task(engine.drain(10))
            await asyncio.sleep(0.02)
            status, error = await s.refusal(CHAT, body())
            assert status == 503 and "shutting down" in error["message"]
            assert (await s.client.get("/health")).status_code == 503
            assert (await running)[-1]["choices"][0]["finish_reason"] == "length"
            await draining

    asyncio.run(main())


def test_what_outlives_the_grace_period_is_not_taken_for_complete(make_engine, serving) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.02)
        async with serving(engine) as s:
            stream = asyncio.create_task(s.post(CHAT, body(400, stream=True)))
            whole = asyncio.create_task(s.post(CHAT, body(400)))
            while engine.load().num_running < 2:
                await asyncio.sleep(0.002)
            await engine.drain(0.1)
            assert (await whole).status_code == 503
            text = (await stream).text
            assert '"error"' in text and "[DONE]" not in text

    asyncio.run(main())


def test_stopping_cuts_off_what_does_not_end(make_engine, serving, wait_idle, caplog) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.02)
        async with serving(engine) as s:
            async with s.client.stream("POST", CHAT, json=body(400, stream=True)) as response:
                chunks = response.aiter_bytes()
                await anext(chunks)
                await asyncio.wait_for(s.server.stop(0.05), 2)
                with pytest.raises(httpx.TransportError):
                    _ = [chunk async for chunk in chunks]
            await wait_idle(engine)

    asyncio.run(main())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_beside_grpc_in_one_process(make_engine) -> None:
    engine = make_engine()
    lines: list[str] = []

    async def main() -> None:
        options = ServerOptions(port=0, http_port=0)
        task = asyncio.create_task(serve(lambda: engine, options, announce=lines.append))
        while not lines:
            await asyncio.sleep(0.01)
        found = re.fullmatch(
            r"READY .* programs_compiled=0 http=(127\.0\.0\.1:\d+) url=http://(.*)/", lines[0]
        )
        assert found and found[1] == found[2]
        async with httpx.AsyncClient(base_url=f"http://{found[1]}", trust_env=False) as client:
            assert (await client.post(CHAT, json=body())).status_code == 200
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_a_taken_port_is_a_clear_error(serving) -> None:
    async def main() -> None:
        async with serving(None) as s:
            options = ServerOptions(port=0, http_port=s.server.port)
            taken = f"cannot serve HTTP on .*:{s.server.port}: .*--http-port 0 takes a free one"
            with pytest.raises(ConfigError, match=taken):
                await serve(lambda: pytest.fail("must not build an engine"), options)

    asyncio.run(main())


def test_a_taken_port_that_nobody_asked_for_is_another(serving, caplog) -> None:
    async def main() -> None:
        async with serving(None) as s:
            options = ServerOptions(http_port=s.server.port, http_port_may_change=True)
            server = HttpServer(options, make_app(ServerContext()))
            await server.start()
            assert server.port not in (0, s.server.port)
            async with httpx.AsyncClient(trust_env=False) as client:
                response = await client.get(f"http://{server.address}/health")
            assert response.status_code == 503
            await server.stop(0)

    asyncio.run(main())
    assert "it takes a free port, unless --http-port names one" in caplog.text
