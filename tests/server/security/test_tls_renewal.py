"""Certificates that change while the server runs."""

import asyncio
import logging
import os
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxserve.files import watched_files
from jaxserve.server.security.tls import Tls
from jaxserve.server.server import GrpcServer, ServerOptions


class Authority:
    """An authority and what it issues, in PEM files of one folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.ca = trustme.CA()
        self.pem = folder / f"{name}-ca.pem"
        self.ca.cert_pem.write_to_path(self.pem)
        self.client = folder / f"{name}-client.pem"
        self.ca.issue_cert("a@example.org").private_key_and_cert_chain_pem.write_to_path(
            self.client
        )

    def write(self, folder: Path) -> None:
        """A server's files, each put in place of an older one at once."""
        issued = self.ca.issue_cert("localhost", "127.0.0.1")
        for name, content in (
            ("key.pem", issued.private_key_pem.bytes()),
            ("cert.pem", b"".join(blob.bytes() for blob in issued.cert_chain_pems)),
            ("clients.pem", self.pem.read_bytes()),
        ):
            new = folder / f"{name}.new"
            new.touch(0o600)
            new.write_bytes(content)
            os.replace(new, folder / name)

    def trusting(self, own: "Authority | None" = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.pem))
        if own is not None:
            context.load_cert_chain(own.client)
        return context

    async def reaches_http(self, port: int, own: "Authority | None" = None) -> bool:
        """Whether a client that trusts this authority gets an answer."""
        try:
            connection = asyncio.open_connection("localhost", port, ssl=self.trusting(own))
            reader, writer = await connection
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            line = await reader.readline()
            writer.close()
        except (ssl.SSLError, ConnectionError):
            return False
        return b"HTTP/1.1" in line

    async def reaches_grpc(self, port: int, own: "Authority | None" = None) -> bool:
        """Whether a client that trusts this authority gets an answer."""
        pem = own.client.read_bytes() if own else None
        credentials = grpc.ssl_channel_credentials(self.pem.read_bytes(), pem, pem)
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
            try:
                stub: Any = health_pb2_grpc.HealthStub(channel)  # it has no types
                await stub.Check(health_pb2.HealthCheckRequest())
            except grpc.aio.AioRpcError:
                return False
        return True


@pytest.fixture
def authorities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Authority, Authority]:
    monkeypatch.setattr(watched_files, "_POLL_SECONDS", 0.0)
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    old.write(tmp_path)
    return old, new


def tls_in(folder: Path, *, mutual: bool = False) -> Tls:
    clients = folder / "clients.pem" if mutual else None
    return Tls(cert=folder / "cert.pem", key=folder / "key.pem", client_ca=clients)


@pytest.mark.parametrize("mutual", [False, True])
def test_new_connections_get_the_new_certificate(
    http_serving, make_engine, authorities, tmp_path: Path, mutual: bool
) -> None:
    old, new = authorities
    before, after = (old, new) if mutual else (None, None)

    async def main() -> None:
        tls = tls_in(tmp_path, mutual=mutual)
        server = GrpcServer(ServerOptions(port=0, host="localhost", tls=tls))
        await server.start()
        verify = old.trusting(before)
        async with http_serving(make_engine(), tls=tls, verify=verify) as s:
            assert await old.reaches_http(s.server.port, before)
            assert await old.reaches_grpc(server.port, before)
            assert (await s.client.get("/health")).status_code == 200
            new.write(tmp_path)
            assert await new.reaches_http(s.server.port, after)
            assert await new.reaches_grpc(server.port, after)
            assert not await old.reaches_http(s.server.port, before)
            assert not await old.reaches_grpc(server.port, before)
            if mutual:  # the clients' authority is another, too
                assert not await new.reaches_http(s.server.port, old)
                assert not await new.reaches_grpc(server.port, old)
            # A connection from before lives on.
            assert (await s.client.get("/health")).status_code == 200
        await server.stop(0)

    asyncio.run(main())


@pytest.mark.parametrize("broken", ["cert.pem", "key.pem", "clients.pem"])
def test_a_broken_change_keeps_the_old_certificate_and_says_so_once(
    http_serving, make_engine, authorities, tmp_path: Path, caplog, broken: str
) -> None:
    old, new = authorities

    async def main() -> None:
        tls = tls_in(tmp_path, mutual=True)
        server = GrpcServer(ServerOptions(port=0, host="localhost", tls=tls))
        await server.start()
        async with http_serving(make_engine(), tls=tls) as s:
            (tmp_path / broken).write_text("not PEM")
            for _ in range(2):
                assert await old.reaches_http(s.server.port, old)
                assert await old.reaches_grpc(server.port, old)
            errors = [each for each in caplog.records if each.levelno == logging.ERROR]
            assert len(errors) == 1
            assert "keeping the TLS certificate and key as they were" in errors[0].getMessage()
            new.write(tmp_path)
            assert await new.reaches_http(s.server.port, new)
            assert await new.reaches_grpc(server.port, new)
        await server.stop(0)

    asyncio.run(main())
