"""The admin surface: off unless asked for, on the loopback interface, and not for web pages."""

import asyncio
import functools
import logging

import pytest

from jaxserve.server.security.admin import make_admin_app
from jaxserve.server.security.options import SecurityOptions
from jaxserve.server.serve import serve
from jaxserve.server.server import ServerOptions
from tests.waiting import PATIENCE


def make(drained: list[int]):
    return functools.partial(make_admin_app, drain=lambda: drained.append(1))


def test_what_runs_is_listed_and_ended(http_serving, serving, make_engine, make_request) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.005)
        async with serving(engine) as g, http_serving(engine, make=make([])) as s:
            request = make_request(max_tokens=400, request_id="one")
            request.service_params.tenant = "acme"
            call = g.stub.Generate(request)
            await call.read()
            (active,) = (await s.client.get("/admin/requests")).json()["requests"]
            assert (active["request_id"], active["tenant"]) == ("one", "acme")
            assert active["seconds"] > 0
            answer = await s.client.post("/admin/abort", json={"request_id": "one"})
            assert answer.json() == {"aborted": True}
            answer = await s.client.post("/admin/abort", json={"request_id": "none"})
            assert answer.json() == {"aborted": False}
            while not (await call.read()).finish_reason:
                pass
            assert (await s.client.get("/admin/requests")).json() == {"requests": []}

    asyncio.run(main())


def test_log_level_and_drain(http_serving, make_engine) -> None:
    drained: list[int] = []

    async def main() -> None:
        async with http_serving(make_engine(), make=make(drained)) as s:
            answer = await s.client.post("/admin/log-level", json={"level": "error"})
            assert answer.json() == {"level": "error"}
            assert logging.getLogger("jaxserve").level == logging.ERROR
            for level in ("loud", 5, None):
                answer = await s.client.post("/admin/log-level", json={"level": level})
                assert answer.status_code == 400
            assert (await s.client.post("/admin/drain")).status_code == 202
            assert drained == [1]

    asyncio.run(main())


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "https://example.org"}, {"Host": "example.org"}, {"Host": "example.org:80"},
     {"Sec-Fetch-Site": "cross-site"}],
)  # fmt: skip
def test_web_pages_are_refused(http_serving, make_engine, headers: dict[str, str]) -> None:
    drained: list[int] = []

    async def main() -> None:
        async with http_serving(make_engine(), make=make(drained)) as s:
            assert (await s.client.post("/admin/drain", headers=headers)).status_code == 403
            assert not drained

    asyncio.run(main())


def test_it_is_another_port_of_the_loopback_interface(make_engine) -> None:
    """Whatever the server's own host is; and draining over it ends the server."""
    lines: list[str] = []

    async def main() -> None:
        import httpx

        options = ServerOptions(port=0, http_port=0, host="0.0.0.0")
        security = SecurityOptions(admin_port=0)
        serving = asyncio.create_task(
            serve(make_engine, options, security=security, announce=lines.append)
        )
        async with asyncio.timeout(PATIENCE):
            while not lines:
                await asyncio.sleep(0.01)
            fields = dict(field.split("=") for field in lines[0].split()[2:])
            assert fields["admin"].startswith("127.0.0.1:")
            async with httpx.AsyncClient(trust_env=False) as client:
                port = fields["http"].rpartition(":")[2]
                answer = await client.post(f"http://127.0.0.1:{port}/admin/drain")
                assert answer.status_code == 404
                answer = await client.post(f"http://{fields['admin']}/admin/drain")
                assert answer.status_code == 202
            await serving

    asyncio.run(main())
