"""TLS, API keys and large bodies on the HTTP port."""

import asyncio
import functools
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest

from jaxserve.server.http.app import make_app
from jaxserve.server.metrics.app import make_metrics_app
from jaxserve.server.security.keys import ApiKeys

# With TLS 1.3 a client learns that it is refused whenever it reads next.
REFUSALS = (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError, ssl.SSLError)
CHAT = "/v1/chat/completions"
ACME = {"Authorization": "Bearer acme-key-0123456789"}
GLOBEX = {"Authorization": "Bearer globex-key-0123456789"}


def body(max_tokens: int = 4, **fields: object) -> dict[str, object]:
    messages = [{"role": "user", "content": "hi"}]
    return {"messages": messages, "temperature": 0, "max_tokens": max_tokens, **fields}


def trusting(ca: Path, own: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca))
    if own is not None:
        context.load_cert_chain(own)
    return context


async def refused(http_serving, tls, verify: ssl.SSLContext, url: str = "/health") -> None:
    async with http_serving(tls=tls, verify=verify) as s:
        with pytest.raises(REFUSALS):
            await s.client.get(url)


def test_tls(certificates, http_serving, make_engine) -> None:
    async def main() -> None:
        tls, engine = certificates.tls, make_engine()
        async with http_serving(engine, tls=tls, verify=trusting(certificates.ca)) as s:
            answer = await s.client.post(CHAT, json=body(50, stream=True))
            assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
        await refused(http_serving, tls, trusting(certificates.strange_ca))
        async with http_serving(tls=tls) as s:
            plain = f"http://{s.server.address}/health"
            with pytest.raises(httpx.RemoteProtocolError):
                await s.client.get(plain)
        old = trusting(certificates.ca)
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning):
            old.minimum_version = ssl.TLSVersion.TLSv1
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        await refused(http_serving, tls, old)

    asyncio.run(main())


def test_mutual_tls(certificates, http_serving) -> None:
    async def main() -> None:
        mutual, ca = certificates.mutual, certificates.ca
        async with http_serving(tls=mutual, verify=trusting(ca, certificates.client)) as s:
            assert (await s.client.get("/health")).status_code == 503
        await refused(http_serving, mutual, trusting(ca))
        await refused(http_serving, mutual, trusting(ca, certificates.stranger))

    asyncio.run(main())


OPEN = {"/health", "/ping", "/", "/page/index.html"}
OTHERS = ("/openapi.json", "/no/such", "/health/", "/page", "/HEALTH", "/docs")


def test_every_route_but_health_and_the_page_needs_a_key(
    http_serving, make_engine, keys_file
) -> None:
    async def main() -> None:
        engine = make_engine()
        async with http_serving(engine, keys=ApiKeys(keys_file())) as s:
            paths = make_app(s.context).openapi()["paths"]
            known = [(method, path) for path, methods in paths.items() for method in methods]
            assert ("post", CHAT) in known and ("get", "/live") in known
            for method, path in [*known, *(("get", path) for path in (*OPEN, *OTHERS))]:
                for headers in ({}, {"Authorization": "Bearer no-such-key-01234567"}):
                    answer = await s.client.request(method, path, headers=headers, json={})
                    if path in OPEN:
                        assert answer.status_code == 200, path
                        continue
                    assert answer.status_code == 401, path
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
                    assert answer.json()["error"]["code"] == "invalid_api_key"
            assert engine.load().num_prompt_tokens == 0
            for headers in (ACME, GLOBEX):
                answer = await s.client.post(CHAT, json=body(), headers=headers)
                assert answer.status_code == 200

    asyncio.run(main())


def test_tenants_over_their_limits_are_told_when_to_come_back(
    http_serving, make_engine, keys_file
) -> None:
    async def main() -> None:
        keys = ApiKeys(keys_file("requests_per_minute = 2"))
        async with http_serving(make_engine(), keys=keys) as s:
            assert (await s.client.post(CHAT, json=body(n=2), headers=ACME)).status_code == 200
            for fields in ({}, {"stream": True}):
                answer = await s.client.post(CHAT, json=body(**fields), headers=ACME)
                assert answer.status_code == 429
                assert answer.json()["error"]["code"] == "rate_limit_exceeded"
                assert 1 <= int(answer.headers["Retry-After"]) <= 60
            assert (await s.client.post(CHAT, json=body(), headers=GLOBEX)).status_code == 200

    asyncio.run(main())


def test_choices_that_are_over_the_limit_end_those_that_were_not(
    http_serving, make_engine, keys_file, wait_idle
) -> None:
    async def main() -> None:
        engine = make_engine()
        keys = ApiKeys(keys_file("max_concurrent_requests = 2"))
        async with http_serving(engine, keys=keys) as s:
            answer = await s.client.post(CHAT, json=body(400, n=3), headers=ACME)
            assert answer.status_code == 429
            await wait_idle(engine)
            answer = await s.client.post(CHAT, json=body(n=2), headers=ACME)
            assert answer.status_code == 200

    asyncio.run(main())


@pytest.mark.parametrize("told", [True, False])
def test_a_large_body_is_refused(http_serving, make_engine, told: bool) -> None:
    num_sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal num_sent
        for _ in range(64):
            num_sent += 1
            yield b'{"messages": "' + b"x" * 1000

    async def main() -> None:
        make = functools.partial(make_app, max_body_bytes=5000)
        async with http_serving(make_engine(), make=make) as s:
            content = b'{"messages": "' + b"x" * 64_000 if told else pieces()
            headers = {"Content-Type": "application/json"}
            answer = await s.client.post(CHAT, content=content, headers=headers)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "request_too_large"
            assert (await s.client.post(CHAT, json=body())).status_code == 200

    asyncio.run(main())


def test_large_headers_are_refused(http_serving, make_engine) -> None:
    async def main() -> None:
        async with http_serving(make_engine()) as s:
            reader, writer = await asyncio.open_connection("127.0.0.1", s.server.port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Large: " + b"x" * 100_000)
            assert b" 400 " in await reader.readline()
            writer.close()
            assert (await s.client.get("/health")).status_code == 200

    asyncio.run(main())


def test_command_line_options_reach_the_server(
    keys_file: Callable[..., Path], certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from jaxserve.cli import serve as command

    got: dict = {}

    async def fake_serve(make_engine, options, *, observability, security) -> None:
        got.update(options=options, security=security)

    monkeypatch.setattr("jaxserve.server.serve.serve", fake_serve)
    tls, path = certificates.mutual, keys_file()
    result = CliRunner().invoke(
        command.serve,
        ["m", "--tls-cert", str(tls.cert), "--tls-key", str(tls.key), "--tls-client-ca",
         str(tls.client_ca), "--api-keys", str(path), "--tenant-tokens-per-minute", "5",
         "--max-n", "3", "--max-connections", "9", "--read-timeout", "7", "--write-timeout", "8",
         "--admin-port", "0"],
    )  # fmt: skip
    assert not result.exit_code, result.output
    options, security = got["options"], got["security"]
    assert options.tls == tls and security.api_keys == path and security.admin_port == 0
    assert (options.max_connections, options.read_timeout, options.write_timeout) == (9, 7, 8)
    assert security.tenant_limits.tokens_per_minute == 5 and security.limits.max_n == 3
    for arguments, message in [
        (["--tls-cert", str(tls.cert)], "--tls-key is missing"),
        (["--tenant-requests-per-minute", "5"], "need --api-keys"),
        (["--max-n", "0"], "max_n must be at least 1"),
        (["--admin-port", "70000"], "admin_port must be in"),
        (["--write-timeout", "0"], "write_timeout must be in (0, 86400], got 0.0"),
    ]:
        result = CliRunner().invoke(command.serve, ["m", *arguments])
        assert result.exit_code == 1 and message in result.output


def test_the_metrics_port_is_guarded_too(http_serving, certificates, keys_file) -> None:
    async def main() -> None:
        own = trusting(certificates.ca, certificates.client)
        keys, make = ApiKeys(keys_file()), make_metrics_app
        tls = certificates.mutual
        async with http_serving(keys=keys, make=make, tls=tls, verify=own) as s:
            assert (await s.client.get("/metrics")).status_code == 401
            answer = await s.client.get("/metrics", headers=ACME)
            assert answer.status_code == 200 and "jaxserve:ready" in answer.text
            async with httpx.AsyncClient(
                trust_env=False, verify=trusting(certificates.ca)
            ) as stranger:
                with pytest.raises(REFUSALS):
                    await stranger.get(f"https://{s.server.address}/metrics", headers=ACME)

    asyncio.run(main())


def test_no_key_is_saved_by_an_absolute_target(http_serving, make_engine, keys_file) -> None:
    async def main() -> None:
        async with http_serving(make_engine(), keys=ApiKeys(keys_file())) as s:
            for target, status in (("http://x/v1/models", b"401"), ("http://x/health", b"200")):
                reader, writer = await asyncio.open_connection("127.0.0.1", s.server.port)
                writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                assert status in await reader.readline(), target
                writer.close()

    asyncio.run(main())


PAGE = {"Origin": "https://chat.example.org"}
PREFLIGHT = {
    **PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


@pytest.mark.parametrize("origins", [["https://chat.example.org"], ["*"]])
def test_web_pages_of_allowed_origins_may_call(
    http_serving, make_engine, keys_file, origins: list[str]
) -> None:
    async def main() -> None:
        make = functools.partial(make_app, cors_origins=origins)
        keys = ApiKeys(keys_file())
        async with http_serving(make_engine(), keys=keys, make=make) as s:
            preflight = await s.client.options(CHAT, headers=PREFLIGHT)
            assert preflight.status_code == 200
            allowed = preflight.headers["access-control-allow-headers"]
            assert {"authorization", "content-type", "x-stainless-os"} <= set(allowed.split(","))
            origin = PAGE["Origin"] if origins != ["*"] else "*"
            for key, status in (("acme-key-0123456789", 200), ("no-such-key-0123456789", 401)):
                headers = {**PAGE, "Authorization": f"Bearer {key}"}
                answer = await s.client.post(CHAT, json=body(), headers=headers)
                assert answer.status_code == status
                assert answer.headers["access-control-allow-origin"] == origin
                assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
            stranger = {**PREFLIGHT, "Origin": "https://other.example.org"}
            refused = (await s.client.options(CHAT, headers=stranger)).status_code
            assert refused == (200 if origins == ["*"] else 400)

    asyncio.run(main())
