"""Clients that connect and then stall, each in one of several ways."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator

_GRPC_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # and empty SETTINGS


def _request(max_tokens: int) -> bytes:
    body = json.dumps({
        "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": max_tokens,
    }).encode()  # fmt: skip
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


# What a stalled client says before it falls silent, and whether to the HTTP port. The last one
# asks for an answer and never reads it.
WAYS: tuple[tuple[bytes, bool], ...] = (
    (b"", True),
    (b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc", True),
    (_request(8)[:-5], True),
    (_request(64), True),
    (b"", False),
    (_GRPC_PREFACE[:20], False),
    (_GRPC_PREFACE, False),
)


class StalledClients:
    """Sockets that are open and read by nobody."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []

    @property
    def num_open(self) -> int:
        """Those that the server has not closed; to be asked in the end, as it has to read."""
        return sum(_is_open(sock) for sock in self.sockets)


@contextlib.asynccontextmanager
async def stalled_clients(
    count: int, http_address: str, grpc_address: str
) -> AsyncIterator[StalledClients]:
    """Connect so many clients, in turn in each of the ways, and close them in the end."""
    loop = asyncio.get_running_loop()
    clients = StalledClients()
    try:
        for i in range(count):
            said, over_http = WAYS[i % len(WAYS)]
            host, _, port = (http_address if over_http else grpc_address).rpartition(":")
            sock = socket.socket()
            clients.sockets.append(sock)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await loop.sock_connect(sock, (host, int(port)))
            await loop.sock_sendall(sock, said)
        yield clients
    finally:
        for sock in clients.sockets:
            sock.close()


def _is_open(sock: socket.socket) -> bool:
    """Whether the server has not ended the connection; reads what it has sent."""
    try:
        while sock.recv(2**16):
            pass
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
