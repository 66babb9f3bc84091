"""One gRPC server: its life from an open port over READY and draining to the end."""

import asyncio
import dataclasses
import re
from collections.abc import Callable, Sequence

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # pyright: ignore[reportAttributeAccessIssue]
from grpc_reflection.v1alpha import reflection
from smg_grpc_proto.generated import vllm_engine_pb2

from jaxserve.core.errors import ConfigError
from jaxserve.core.options import AT_LEAST_ONE, check_number
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.context import ServerContext
from jaxserve.server.handlers import generic_handler
from jaxserve.server.kserve import open_inference_pb2
from jaxserve.server.kserve.servicer import InferenceServicer
from jaxserve.server.security.interceptor import KeyInterceptor
from jaxserve.server.security.streams import StreamWatch
from jaxserve.server.security.tls import Tls
from jaxserve.server.v1 import jaxserve_pb2
from jaxserve.server.v1.servicer import JaxserveServicer
from jaxserve.server.vllm_grpc.servicer import VllmEngineServicer

# The services of this server, and what answers each; all over the same engine.
SERVICERS: dict[ServiceDescriptor, Callable[[ServerContext], object]] = {
    jaxserve_pb2.DESCRIPTOR.services_by_name["Jaxserve"]: JaxserveServicer,
    open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]: InferenceServicer,
    vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"]: VllmEngineServicer,
}
_PORT, _SECONDS = "[0, 65535]", "(0, 86400]"
_RANGES = {
    "port": _PORT, "metrics_port": _PORT, "http_port": _PORT,
    "grace_period": "[0, 86400]", "read_timeout": _SECONDS, "write_timeout": _SECONDS,
    "step_timeout": _SECONDS, "max_message_mib": "(0, 2048)", "max_connections": AT_LEAST_ONE,
    "max_concurrent_streams": AT_LEAST_ONE,
}  # fmt: skip
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")
_LAST_WRITES_SECONDS = 2.0  # for aborted streams to deliver their last message
_STOP_SECONDS = 0.5  # for the rest, such as health watches, which end only with the server


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where and how to listen.

    Attributes:
        host: name or address of the interface to listen on; IPv6 without brackets.
        port: TCP port; 0 takes a free one.
        grace_period: seconds that running requests get to finish once the server drains.
        max_message_mib: largest message, either way, in MiB.
        max_concurrent_streams: calls at the same time on one connection.
        metrics_port: HTTP port of the Prometheus metrics; None or 0 for none.
        http_port: TCP port of the OpenAI-compatible API; 0 takes a free one, None for none.
        http_port_may_change: whether a free one is taken if that one cannot be had.
        cors_origins: origins whose web pages may call the HTTP API, such as
            `https://chat.example.org`; "*" stands for all.
        tool_call_parser: how the model writes tool calls: a name of `server/tools/registry.py`.
        reasoning_parser: the markers around thoughts: a name of `server/reasoning/registry.py`.
        tls: what to encrypt with, and whom to let in; None for plain text.
        max_connections: clients connected to one port at the same time; more are turned away.
        read_timeout: seconds in which a client must have sent what it began to: the handshake,
            and each HTTP request.
        write_timeout: seconds that a stream waits for a client that reads nothing, before it is
            cut off.
        step_timeout: seconds after which a step is taken to hang; None: see `StepWatchdog`.

    Raises:
        ConfigError: a value is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    grace_period: float = 30.0
    max_message_mib: float = 16.0
    max_concurrent_streams: int = 4096
    metrics_port: int | None = None
    http_port: int | None = None
    http_port_may_change: bool = False
    cors_origins: tuple[str, ...] = ()
    tool_call_parser: str = "auto"
    reasoning_parser: str = "none"
    tls: Tls | None = None
    max_connections: int = 4096
    read_timeout: float = 30.0
    write_timeout: float = 30.0
    step_timeout: float | None = None

    def __post_init__(self) -> None:
        for name, interval in _RANGES.items():
            if (value := getattr(self, name)) is not None:
                check_number(name, value, interval)
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"cors_origins: {origin!r} is no origin such as https://chat.example.org: "
                    "scheme, host and port if it is not the usual one, without a path"
                )

    def channel_options(self) -> list[tuple[str, int]]:
        """gRPC core's options for these settings."""
        max_bytes = int(self.max_message_mib * 2**20)
        return [
            ("grpc.max_receive_message_length", max_bytes),
            ("grpc.max_send_message_length", max_bytes),
            ("grpc.max_concurrent_streams", self.max_concurrent_streams),
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.server_handshake_timeout_ms", int(self.read_timeout * 1000)),
            ("grpc.so_reuseport", 0),  # or a second server would silently share the port
            # Clients may ping as they like, also between calls, without being cut off.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
            ("grpc.http2.max_ping_strikes", 0),
            # Our own pings notice clients that vanished without closing the connection.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.max_pings_without_data", 0),
        ]


class GrpcServer:
    """The gRPC server around one engine.

    `start` opens the port at once (calls are UNAVAILABLE, health NOT_SERVING), `attach` begins
    to serve, `drain` ends gently, `stop` ends. All of it on one event loop.

    Args:
        options: where and how to listen.
        context: shared with the server's other front ends, if it has any.
        interceptors: see every call of every service first, health and reflection included.
    """

    def __init__(
        self,
        options: ServerOptions,
        context: ServerContext | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        self._options = options
        self._context = context or ServerContext()
        self._health = health_aio.HealthServicer()
        keys = self._context.keys
        guards = [KeyInterceptor(keys)] if keys is not None else []
        self._server = grpc.aio.server(
            interceptors=(*guards, *interceptors), options=options.channel_options()
        )
        self._streams = StreamWatch(options.write_timeout)
        self._watch: asyncio.Task[None] | None = None
        self.port = options.port

    @property
    def address(self) -> str:
        """`host:port` as clients dial it; the real port once started."""
        host = f"[{self._options.host}]" if ":" in self._options.host else self._options.host
        return f"{host}:{self.port}"

    async def start(self) -> None:
        """Open the port and answer, as not ready yet.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        self._server.add_generic_rpc_handlers(
            tuple(
                generic_handler(service, make(self._context), self._streams)
                for service, make in SERVICERS.items()
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        services = [service.full_name for service in SERVICERS]
        services += ["grpc.health.v1.Health", reflection.SERVICE_NAME]
        reflection.enable_server_reflection(services, self._server)
        await self._set_health(serving=False)
        try:
            if self._options.tls is None:
                self.port = self._server.add_insecure_port(self.address)
            else:
                credentials = self._options.tls.grpc_credentials()
                self.port = self._server.add_secure_port(self.address, credentials)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {self.address}: is the port taken, or the host not ours? "
                "--port 0 takes a free one"
            ) from error
        await self._server.start()
        self._watch = asyncio.create_task(self._streams.watch())

    async def attach(self, engine: AsyncEngine) -> None:
        """Serve this engine from now on."""
        self._context.engine = engine
        await self._set_health(serving=True)

    async def drain(self) -> None:
        """Refuse new requests and let the running ones finish within the grace period."""
        await self._set_health(serving=False)
        if self._context.engine is not None:
            await self._context.engine.drain(self._options.grace_period)
            await self._context.wait_idle(_LAST_WRITES_SECONDS)

    async def stop(self, grace: float = _STOP_SECONDS) -> None:
        """Close the port; calls still open after `grace` seconds are cut off."""
        await self._set_health(serving=False)
        await self._server.stop(grace)
        if self._watch is not None:
            self._watch.cancel()

    async def _set_health(self, *, serving: bool) -> None:
        states = health_pb2.HealthCheckResponse
        for service in ("", *(service.full_name for service in SERVICERS)):
            await self._health.set(service, states.SERVING if serving else states.NOT_SERVING)
