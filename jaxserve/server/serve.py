"""`serve`: from nothing to READY, and on to a clean end at a signal."""

import asyncio
import dataclasses
import faulthandler
import gc
import logging
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping

from jaxserve.core.errors import EngineDead, InvalidRequest, StepHung
from jaxserve.engine.async_engine import ENGINE_THREAD, AsyncEngine
from jaxserve.server.context import ServerContext
from jaxserve.server.http.app import make_app
from jaxserve.server.http.connections import AcceptErrors
from jaxserve.server.http.server import HttpServer
from jaxserve.server.metrics.app import make_metrics_app
from jaxserve.server.metrics.endpoint import metrics_router
from jaxserve.server.observability import Observability, ObservabilityOptions
from jaxserve.server.security.admin import ADMIN_HOST, make_admin_app
from jaxserve.server.security.options import SecurityOptions, connections_within
from jaxserve.server.security.tls import Tls
from jaxserve.server.server import GrpcServer, ServerOptions
from jaxserve.server.signals import Signals
from jaxserve.server.watchdog import StepWatchdog

log = logging.getLogger(__name__)

_BUILD = "jaxserve-build"  # the thread's name
_LAST_WRITES_SECONDS = 2.0  # for streams to tell what has happened
_SAVE_SECONDS = 60.0  # for an engine to keep what outlives it
_HASTY_SECONDS = 1.0  # for an engine to end after a second signal
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
# The engine's thread should not wait for the event loop's to give way, which takes 5 ms by default.
# With 20,000 tokens/s over gRPC on a machine busy with other things, the engine made 66, 67 and 64
# of 78 steps/s with that, and 78, 71 and 72 with this; on an idle one all of them either way.
_SWITCH_SECONDS = 1e-4


def _announce(line: str) -> None:
    print(line, flush=True)


async def serve(
    make_engine: Callable[[], AsyncEngine],
    options: ServerOptions,
    *,
    observability: ObservabilityOptions | None = None,
    security: SecurityOptions | None = None,
    announce: Callable[[str], None] = _announce,
) -> int:
    """Serve an engine over gRPC, and over HTTP unless that is off, until SIGTERM or SIGINT.

    The ports open at once; the engine is made on a thread meanwhile, and a line that begins
    with READY is announced when it serves. The first signal drains, a second one stops at
    once; during start-up the first one stops. What hangs may outlive this on its thread: a process
    that has such threads (`has_threads`) is to be ended by `os._exit`.

    Args:
        make_engine: builds the engine, blocking until it is compiled and warm.
        options: where and how to listen.
        observability: what is told of the engine beside metrics, and how.
        security: who may call, and how much they may ask for.
        announce: takes the READY line.

    Returns:
        The exit status for the process: 0 after a drain, otherwise that of the signal.

    Raises:
        ConfigError: a port cannot be listened on, a package for traces is missing, or the file
            of API keys is wrong.
        EngineDead: the engine failed while serving.
        StepHung: a step does not end, while serving or at the end.
        Exception: whatever `make_engine` raises.
    """
    started = time.monotonic()
    signals = Signals()
    security = security or SecurityOptions()
    ports = (options.port, options.http_port, options.metrics_port or None, security.admin_port)
    room = connections_within(options.max_connections, sum(port is not None for port in ports))
    options = dataclasses.replace(options, max_connections=room)
    asyncio.get_running_loop().set_exception_handler(AcceptErrors())
    sys.setswitchinterval(_SWITCH_SECONDS)
    context = ServerContext(
        security.limits,
        security.load_keys(),
        observability=Observability(observability),
        tool_call_parser=options.tool_call_parser,
        reasoning_parser=options.reasoning_parser,
    )
    if context.keys is not None and options.tls is None and options.host not in _LOOPBACK:
        log.warning("API keys are on and TLS is not: whoever sees the traffic has the keys")
    server = GrpcServer(options, context)
    fixed = dataclasses.replace(options, http_port_may_change=False)
    optional = {
        "metrics": _metrics_server(fixed, context),
        "http": _http_server(options, context),
        "admin": _admin_server(security, fixed, context, signals.trigger),
    }
    beside = {name: front_end for name, front_end in optional.items() if front_end is not None}
    engine: AsyncEngine | None = None
    with signals:
        try:
            await server.start()
            for front_end in beside.values():
                await front_end.start()
            building = _on_daemon_thread(lambda: _with_chats(make_engine()))
            if not await signals.unless_first(building):
                log.warning("stopped during start-up")
                return signals.status
            engine = building.result()
            await server.attach(engine)
            gc.freeze()  # what start-up has made is here to stay; going over it takes milliseconds
            seconds = time.monotonic() - started
            announce(_ready_line(server, beside, engine, seconds, options.tls))
            watchdog = StepWatchdog(engine, options.step_timeout)
            if await signals.unless_first(asyncio.ensure_future(watchdog.watch())):
                raise EngineDead("the engine has stopped; its traceback is in the log above")
            log.warning("draining: up to %g s; a second signal stops", options.grace_period)
            if not await signals.unless_second(asyncio.ensure_future(server.drain())):
                return signals.status
        except StepHung:
            faulthandler.dump_traceback()  # where
            await context.wait_idle(_LAST_WRITES_SECONDS)
            raise
        finally:
            grace = 0.0 if signals.count > 1 else 0.5
            await asyncio.gather(*(each.stop(grace) for each in (server, *beside.values())))
            has_ended = engine is None or await _ended(engine, signals)
            await asyncio.to_thread(context.observability.close)
    if not has_ended and signals.count < 2:
        raise StepHung(
            "a step has not ended with the drain: the device, or what it waits for, hangs"
        )
    return 0 if signals.count < 2 else signals.status


def _with_chats(engine: AsyncEngine) -> AsyncEngine:
    """The engine, once its chat template is compiled: the first chat should not wait for that."""
    try:
        log.debug("the chat template reads %s", sorted(engine.tokenizer.chat_variables))
    except InvalidRequest as error:
        log.warning("chats will be refused: %s", error)
    return engine


def _http_server(options: ServerOptions, context: ServerContext) -> HttpServer | None:
    if options.http_port is None:
        return None
    routers = [metrics_router(context.observability.metrics)]
    max_bytes = int(options.max_message_mib * 2**20)
    app = make_app(
        context, routers=routers, max_body_bytes=max_bytes, cors_origins=options.cors_origins
    )
    return HttpServer(options, app)


def _metrics_server(options: ServerOptions, context: ServerContext) -> HttpServer | None:
    if not options.metrics_port:
        return None
    options = dataclasses.replace(options, http_port=options.metrics_port)
    return HttpServer(options, make_metrics_app(context))


def _admin_server(
    security: SecurityOptions,
    options: ServerOptions,
    context: ServerContext,
    drain: Callable[[], None],
) -> HttpServer | None:
    if security.admin_port is None:
        return None
    options = dataclasses.replace(options, host=ADMIN_HOST, http_port=security.admin_port, tls=None)
    return HttpServer(options, make_admin_app(context, drain))


def _ready_line(
    server: GrpcServer,
    beside: Mapping[str, HttpServer],
    engine: AsyncEngine,
    seconds: float,
    tls: Tls | None,
) -> str:
    line = (
        f"READY {server.address} model={engine.model_info.name} seconds={seconds:.1f} "
        f"programs_compiled={engine.load().compiles_before_ready}"
    )
    line += "".join(f" {name}={each.address}" for name, each in beside.items())
    if "http" in beside:
        line += f" url={'http' if tls is None else 'https'}://{beside['http'].address}/"
    return line


async def _ended(engine: AsyncEngine, signals: Signals) -> bool:
    """End an engine, with the time that its steps let expect; less after a second signal."""
    engine.shutdown(0)
    began = time.monotonic()
    patience = 0.0 if engine.is_given_up else engine.patience + _SAVE_SECONDS
    while engine.is_alive:
        if time.monotonic() - began > (patience if signals.count < 2 else _HASTY_SECONDS):
            return False
        await asyncio.sleep(0.01)
    return True


def has_threads(others: Collection[threading.Thread] = ()) -> bool:
    """Whether something of `serve` is still at work, which the interpreter's end would crash.

    Args:
        others: threads that were there before it, and are somebody else's.
    """
    names = (_BUILD, ENGINE_THREAD)
    return any(t.name in names and t not in others for t in threading.enumerate())


def _on_daemon_thread(function: Callable[[], AsyncEngine]) -> "asyncio.Future[AsyncEngine]":
    """Run a function on a thread that does not keep the process alive, unlike an executor's."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[AsyncEngine] = loop.create_future()

    def settle(result: AsyncEngine | None, error: BaseException | None) -> None:
        if future.cancelled():
            if result is not None:
                result.shutdown()
        elif error is not None:
            future.set_exception(error)
        elif result is not None:
            future.set_result(result)

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:
            error = caught
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:  # the loop is closed: we were stopped during start-up
            log.debug("the engine came too late")

    threading.Thread(target=run, name=_BUILD, daemon=True).start()
    return future
