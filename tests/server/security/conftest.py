"""Keys files, certificates for an hour, and servers that use them."""

import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import trustme
from fastapi import FastAPI

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.context import ServerContext
from jaxserve.server.http.app import make_app
from jaxserve.server.http.server import HttpServer
from jaxserve.server.security.keys import ApiKeys
from jaxserve.server.security.tls import Tls
from jaxserve.server.server import ServerOptions
from tests.waiting import PATIENCE

ACME_KEY = "acme-key-0123456789"
GLOBEX_KEY = "globex-key-0123456789"


class Certificates(NamedTuple):
    """PEM files of a server, its authority, a client of that authority, and a stranger."""

    tls: Tls
    mutual: Tls
    ca: Path
    client: Path  # key and certificates in one file
    stranger: Path  # likewise, by another authority
    strange_ca: Path


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    ca, strange_ca = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    strange_ca.cert_pem.write_to_path(folder / "strange-ca.pem")
    server = ca.issue_cert("localhost", "127.0.0.1")
    server.private_key_pem.write_to_path(folder / "server-key.pem")
    for i, blob in enumerate(server.cert_chain_pems):
        blob.write_to_path(folder / "server.pem", append=i > 0)
    ca.issue_cert("client@example.org").private_key_and_cert_chain_pem.write_to_path(
        folder / "client.pem"
    )
    strange_ca.issue_cert("stranger@example.org").private_key_and_cert_chain_pem.write_to_path(
        folder / "stranger.pem"
    )
    for file in folder.iterdir():
        file.chmod(0o600)
    tls = Tls(cert=folder / "server.pem", key=folder / "server-key.pem")
    return Certificates(
        tls,
        Tls(cert=tls.cert, key=tls.key, client_ca=folder / "ca.pem"),
        ca=folder / "ca.pem",
        client=folder / "client.pem",
        stranger=folder / "stranger.pem",
        strange_ca=folder / "strange-ca.pem",
    )


@pytest.fixture
def keys_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a keys file of two tenants, acme with more lines if given, and returns its path."""

    def write(acme: str = "") -> Path:
        path = tmp_path / "keys.toml"
        digest = hashlib.sha256(GLOBEX_KEY.encode()).hexdigest()
        path.touch(0o600)
        path.write_text(
            f'[tenants.acme]\nkeys = ["{ACME_KEY}"]\n{acme}\n'
            f'[tenants.globex]\nkeys = ["sha256:{digest}"]\n'
        )
        return path

    return write


class HttpServing(NamedTuple):
    """A running HTTP server and a client of it."""

    server: HttpServer
    context: ServerContext
    client: httpx.AsyncClient


@contextlib.asynccontextmanager
async def _http_serving(
    engine: AsyncEngine | None = None,
    *,
    keys: ApiKeys | None = None,
    make: Callable[..., FastAPI] = make_app,
    verify: Any = True,
    **options: Any,
) -> AsyncIterator[HttpServing]:
    context = ServerContext(keys=keys)
    if engine is not None:
        context.engine = engine
    server = HttpServer(ServerOptions(**{"http_port": 0, **options}), make(context))
    await server.start()
    try:
        scheme = "https" if options.get("tls") else "http"
        url = f"{scheme}://{server.address}"
        async with httpx.AsyncClient(
            base_url=url, timeout=PATIENCE, trust_env=False, verify=verify
        ) as client:
            yield HttpServing(server, context, client)
    finally:
        await server.stop(0)


@pytest.fixture
def http_serving() -> Callable[..., contextlib.AbstractAsyncContextManager[HttpServing]]:
    """`async with http_serving(engine, keys=, make=, verify=, **ServerOptions) as s`."""
    return _http_serving
