"""What HTTP allows beside a plain POST: HEAD, absolute targets, encodings, other origins."""

import asyncio
import gzip
import json
import re
import zlib

import httpx
import pytest
from click.testing import CliRunner

from jaxserve.cli import serve as command
from jaxserve.core.errors import ConfigError
from jaxserve.server.server import ServerOptions

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
BODY = json.dumps(
    {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}
).encode()
PREFLIGHT = {"Origin": "https://chat.example.org", "Access-Control-Request-Method": "POST"}


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


def post(base_url: str, content: bytes, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(base_url + CHAT, content=content, headers={**JSON, **named}, trust_env=False)


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/version", "/live"])
def test_head_is_get_without_its_body(base_url: str, path: str) -> None:
    with httpx.Client(base_url=base_url, trust_env=False) as client:
        head, get = client.head(path), client.get(path)
        assert head.status_code == get.status_code == 200 and not head.content
        if path != "/live":  # which is never the same twice
            assert head.headers["content-length"] == get.headers["content-length"]
        assert client.head(CHAT).status_code == 405


def test_a_target_may_be_absolute(make_engine, serving) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            for target in ("http://x/health", "HTTPS://x:1/health?a=b", "http://x"):
                reader, writer = await asyncio.open_connection("127.0.0.1", s.server.port)
                writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                assert b"200 OK" in await reader.readline(), target
                writer.close()

    asyncio.run(main())


async def statuses(port: int, *parts: bytes) -> list[bytes]:
    """The status lines that come back for what is sent in these parts, one after another."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0.02)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return re.findall(rb"HTTP/1\.1 \d{3} [^\r]*", answer)


def test_empty_lines_before_a_request_are_skipped(make_engine, serving) -> None:
    get = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    body = b'\r\n{"prompt":"a"}'
    post = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    post += b"Content-Length: %d\r\n\r\n" % len(body)
    last = get.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")

    async def main() -> None:
        async with serving(make_engine()) as s:
            ok = b"HTTP/1.1 200 OK"
            assert await statuses(s.server.port, b"\r\n" + last) == [ok]
            assert await statuses(s.server.port, b"\r\n", b"\n\r\n", last) == [ok]
            assert await statuses(s.server.port, get, b"\r\n" + get, b"\r\n", last) == [ok] * 3
            # A body's own are part of it.
            assert await statuses(s.server.port, post, body, last) == [ok] * 2
            [bad] = await statuses(s.server.port, b"\x01\r\n" + last)
            assert bad.startswith(b"HTTP/1.1 400")

    asyncio.run(main())


def test_an_upgrade_that_is_not_served_is_no_warning(
    make_engine, serving, caplog: pytest.LogCaptureFixture
) -> None:
    fields = b"Host: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n"

    async def main() -> None:
        async with serving(make_engine()) as s:
            for path, status in ((b"/health", b"200"), (b"/v1/realtime", b"404")):
                [line] = await statuses(s.server.port, b"GET %s HTTP/1.1\r\n%s" % (path, fields))
                assert line.split()[1] == status

    asyncio.run(main())
    assert not caplog.records


@pytest.mark.parametrize(
    ("encoding", "content"),
    [
        ("gzip", gzip.compress(BODY)), ("x-gzip", gzip.compress(BODY)), ("identity", BODY),
        ("deflate", zlib.compress(BODY)), ("Deflate", raw_deflate(BODY)),
        ("gzip", gzip.compress(BODY[:-1] + b" " * 10**6 + b"}", 0)),
    ],
    ids=["gzip", "x-gzip", "identity", "zlib", "raw deflate", "large"],
)  # fmt: skip
def test_a_body_may_be_compressed(base_url: str, encoding: str, content: bytes) -> None:
    answer = post(base_url, content, Content_Encoding=encoding)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("encoding", "content", "status", "message"),
    [
        ("gzip", gzip.compress(BODY)[:-9], 400, "is cut off"),
        ("gzip", gzip.compress(BODY) * 2, 400, "goes on after its end"),
        ("gzip", BODY, 400, "not valid gzip"),
        ("deflate", b"\xff" * 9, 400, "not valid deflate"),
        ("gzip", gzip.compress(b" " * 20 * 2**20), 413, "more than the 16777216 bytes"),
        ("br", BODY, 415, "Content-Encoding: br is not read here, only gzip or deflate"),
        ("zstd", BODY, 415, "Content-Encoding: zstd is not read here"),
        ("gzip, gzip", BODY, 415, "Content-Encoding: gzip, gzip is not read here"),
    ],
    # gzip writes the time into a content, and workers must name tests alike.
    ids=["cut", "twice", "not gzip", "not deflate", "bomb", "brotli", "zstd", "gzip twice"],
)
def test_what_cannot_be_decompressed_is_refused(
    base_url: str, encoding: str, content: bytes, status: int, message: str
) -> None:
    answer = post(base_url, content, Content_Encoding=encoding)
    assert answer.status_code == status and message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content_type", "message"),
    [("", "the request has none"), ("text/plain", "not 'text/plain'"),
     ("application/x-www-form-urlencoded", "not 'application/x-www-form-urlencoded'")],
)  # fmt: skip
def test_a_body_that_says_it_is_no_json_is_told_so(
    base_url: str, content_type: str, message: str
) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    answer = httpx.post(base_url + CHAT, content=BODY, headers=headers, trust_env=False)
    assert answer.status_code == 415
    assert "must be application/json" in answer.json()["error"]["message"]
    assert message in answer.json()["error"]["message"]
    named = {"Content-Type": "application/vnd.api+json; charset=utf-8"}
    answer = httpx.post(base_url + CHAT, content=BODY, headers=named, trust_env=False)
    assert answer.status_code == 200


def test_web_pages_may_not_call_by_default(base_url: str) -> None:
    with httpx.Client(base_url=base_url, trust_env=False) as client:
        assert client.options(CHAT, headers=PREFLIGHT).status_code == 405
        answer = client.get("/health", headers=PREFLIGHT)
        assert "access-control-allow-origin" not in answer.headers


def test_origins_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[ServerOptions] = []

    async def fake_serve(make_engine, options, **others) -> int:
        got.append(options)
        return 0

    monkeypatch.setattr("jaxserve.server.serve.serve", fake_serve)
    arguments = ["m", "--cors-origins", "https://a.org, http://localhost:3000"]
    assert not CliRunner().invoke(command.serve, arguments).exit_code
    assert got[0].cors_origins == ("https://a.org", "http://localhost:3000")
    for wrong in ("a.org", "https://a.org/", "https://"):
        with pytest.raises(ConfigError, match="is no origin"):
            ServerOptions(cors_origins=(wrong,))


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_ping_is_health(serving, make_engine, method: str) -> None:
    async def main() -> None:
        async with serving(None) as s:
            assert (await s.client.request(method, "/ping")).status_code == 503
            s.context.engine = make_engine()
            assert (await s.client.request(method, "/ping")).status_code == 200

    asyncio.run(main())
