"""Clients that stand still are cut off, and hold up nobody until then."""

import asyncio
import json
import logging
import socket
from collections.abc import Iterator

import pytest

from jaxserve.server.http import connections
from tests.waiting import PATIENCE

CHAT = "/v1/chat/completions"


def request(max_tokens: int, **fields: object) -> bytes:
    """A streamed chat, as bytes."""
    messages = [{"role": "user", "content": "hi"}]
    body = json.dumps(
        {"messages": messages, "max_tokens": max_tokens, "stream": True, **fields}
    ).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """uvicorn says of every broken request that it was broken."""
    logging.getLogger("uvicorn.error").disabled = True
    yield
    logging.getLogger("uvicorn.error").disabled = False


async def end_of(reader: asyncio.StreamReader, seconds: float = PATIENCE) -> bytes:
    """What comes until the server ends the connection."""
    async with asyncio.timeout(seconds):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\n", request(5)[:-3]],
    ids=["nothing", "half a line", "half a head", "half a body"],
)
def test_a_request_that_does_not_come_is_cut_off(
    http_serving, make_engine, wait_idle, sent: bytes
) -> None:
    async def main() -> None:
        engine = make_engine()
        async with http_serving(engine, read_timeout=0.2) as s:
            reader, writer = await asyncio.open_connection("127.0.0.1", s.server.port)
            writer.write(sent)
            assert await end_of(reader) == b""
            writer.close()
            assert not s.server._connections.open
            assert (await s.client.get("/health")).status_code == 200
            await wait_idle(engine)

    asyncio.run(main())


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01"])
def test_a_handshake_that_does_not_come_is_cut_off(
    http_serving, make_engine, certificates, caplog, sent: bytes
) -> None:
    async def main() -> None:
        async with http_serving(make_engine(), tls=certificates.tls, read_timeout=0.2) as s:
            reader, writer = await asyncio.open_connection("127.0.0.1", s.server.port)
            writer.write(sent)
            assert await end_of(reader) == b""
            writer.close()

    asyncio.run(main())
    assert not caplog.records


def test_bytes_now_and_then_do_not_help(http_serving, make_engine) -> None:
    async def main() -> None:
        async with http_serving(make_engine(), read_timeout=0.3) as s:
            reader, writer = await asyncio.open_connection("127.0.0.1", s.server.port)
            ended = asyncio.create_task(end_of(reader))
            for byte in request(5):
                if ended.done():
                    break
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)
            assert ended.done() and ended.result() == b""
            writer.close()

    asyncio.run(main())


def test_many_requests_on_one_connection_are_no_standstill(http_serving, make_engine) -> None:
    async def main() -> None:
        async with http_serving(make_engine(), read_timeout=0.3) as s:
            reader, writer = await asyncio.open_connection("127.0.0.1", s.server.port)
            for _ in range(10):
                writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(len(b'{"status":"ready"}'))
                await asyncio.sleep(0.08)
            writer.close()

    asyncio.run(main())


def test_a_long_answer_is_no_standstill(http_serving, make_engine) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.02)
        async with http_serving(engine, read_timeout=0.1, write_timeout=0.1) as s:
            body = json.loads(request(40, stream=False, ignore_eos=True).split(b"\r\n\r\n")[1])
            answer = await s.client.post(CHAT, json=body)
            assert answer.json()["usage"]["completion_tokens"] == 40

    asyncio.run(main())


def test_a_stream_that_nobody_reads_is_cut_off_and_its_pages_freed(
    http_serving, make_engine, wait_idle
) -> None:
    async def main() -> None:
        engine = make_engine(
            max_model_len=60_000, num_pages=20_000, step_seconds=0.0002, max_num_seqs=4
        )
        async with http_serving(engine, write_timeout=0.5) as s:
            reader, writer = await asyncio.open_connection("127.0.0.1", s.server.port, limit=1024)
            writer.transport.get_extra_info("socket").setsockopt(1, 8, 4096)  # SO_RCVBUF
            writer.write(request(50_000, ignore_eos=True, logprobs=True, top_logprobs=20))
            await reader.readline()
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            async with asyncio.timeout(PATIENCE):
                while not s.server._connections.num_cut:
                    largest = max(
                        (c.transport._transport.get_write_buffer_size()
                         for c in s.server._connections.open), default=0,
                    )  # fmt: skip
                    assert largest < 2**20
                    # Beside it, others are served.
                    assert (await s.client.get("/health")).status_code == 200
                    await asyncio.sleep(0.02)
            await wait_idle(engine)
            assert engine.load().num_aborted == 1
            writer.close()

    asyncio.run(main())


def test_too_many_connections_are_turned_away(http_serving, make_engine) -> None:
    async def main() -> None:
        async with http_serving(make_engine(), max_connections=3, read_timeout=0.5) as s:
            held = [await asyncio.open_connection("127.0.0.1", s.server.port) for _ in range(3)]
            async with asyncio.timeout(PATIENCE):
                while len(s.server._connections.open) < 3:
                    await asyncio.sleep(0.01)
            answer = await s.client.get("/health")
            assert answer.status_code == 503 and answer.headers["Retry-After"]
            assert answer.json()["error"]["message"] == "too many connections"
            for reader, writer in held:
                assert await end_of(reader) == b""
                writer.close()
            assert (await s.client.get("/health")).status_code == 200

    asyncio.run(main())


def test_small_writes_do_not_wait_for_the_client(http_serving, make_engine) -> None:
    async def main() -> None:
        async with http_serving(make_engine()) as s:
            _, writer = await asyncio.open_connection("127.0.0.1", s.server.port)
            async with asyncio.timeout(PATIENCE):
                while not s.server._connections.open:
                    await asyncio.sleep(0.01)
            (connection,) = s.server._connections.open
            sock = connection.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()

    asyncio.run(main())


def answer_request(max_tokens: int, version: str = "1.1", **fields: object) -> bytes:
    """A chat with one whole answer, as bytes."""
    whole = request(max_tokens, stream=False, ignore_eos=True, **fields)
    return whole.replace(b"HTTP/1.1", f"HTTP/{version}".encode())


@pytest.mark.parametrize("sent", [1, 2], ids=["one request", "two at once"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_only_ends_its_own_half_gets_its_answers(
    http_serving, make_engine, stream: bool, sent: int
) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.01)
        async with http_serving(engine) as s:
            reader, writer = await asyncio.open_connection("127.0.0.1", s.server.port)
            writer.write(request(20, stream=stream, ignore_eos=True) * sent)
            writer.write_eof()
            text = await end_of(reader)  # the server ends its half after the last answer
            assert text.count(b"HTTP/1.1 200 OK") == sent
            assert text.count(b'"finish_reason":"length"') == sent
            assert engine.load().num_aborted == 0
            writer.close()

    asyncio.run(main())


def test_a_client_that_waits_with_its_half_ended_is_asked_whether_it_is_there(
    http_serving, make_engine, wait_idle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_FIRST_PROBE_SECONDS", 0.0)

    async def main() -> None:
        engine = make_engine(step_seconds=0.01)
        async with http_serving(engine) as s:
            for version in ("1.0", "1.1"):
                reader, writer = await asyncio.open_connection("127.0.0.1", s.server.port)
                writer.write(answer_request(60, version))
                writer.write_eof()
                text = await end_of(reader)
                interim = b"HTTP/1.1 100 Continue\r\n\r\n"
                assert text.startswith(interim) is (version == "1.1")
                assert b'"completion_tokens":60' in text
                writer.close()
            # One that goes away altogether is noticed, and its request aborted.
            _, writer = await asyncio.open_connection("127.0.0.1", s.server.port)
            writer.write(answer_request(400))
            await writer.drain()
            while not engine.load().num_running:
                await asyncio.sleep(0.002)
            writer.close()
            await wait_idle(engine)
            assert engine.load().num_aborted == 1

    asyncio.run(main())


@pytest.mark.parametrize("sent", [b"", b"GET /health", request(5)[:-3]])
def test_a_client_that_ends_amid_a_request_is_let_go(
    http_serving, make_engine, sent: bytes
) -> None:
    async def main() -> None:
        async with http_serving(make_engine()) as s:
            reader, writer = await asyncio.open_connection("127.0.0.1", s.server.port)
            writer.write(sent)
            writer.write_eof()
            assert await end_of(reader) == b""
            writer.close()

    asyncio.run(main())
