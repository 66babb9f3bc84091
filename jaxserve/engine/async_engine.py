"""The engine on a thread of its own, with an asyncio face for servers."""

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from jaxserve.cache.events import EventLog
from jaxserve.core.errors import (
    Draining,
    EngineDead,
    JaxserveError,
    RequestFailed,
    StepHung,
    TargetMissed,
)
from jaxserve.core.request import FinishReason
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.core.step_histogram import StepHistogram
from jaxserve.engine.accounts import Account, Accounts
from jaxserve.engine.engine import Engine
from jaxserve.engine.mailbox import Mailbox
from jaxserve.engine.outputs import (
    ActiveRequest,
    Embedding,
    EngineLoad,
    KvMap,
    ModelInfo,
    TokenDelta,
)
from jaxserve.engine.pulse import Pulse
from jaxserve.engine.records import EngineRecords
from jaxserve.engine.sampling_rules import SamplingRules
from jaxserve.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)

MAX_RULE_THREADS = 2  # grammars compiled at the same time; more wait

ENGINE_THREAD = "jaxserve-engine"  # the name of the thread that steps
LEAST_PATIENCE = 10.0  # seconds that a step under way has to end, when all is to end
_TOO_LATE = "the request could not meet its target any more; try again later"


@dataclasses.dataclass(frozen=True, eq=False)
class _Subscriber:
    """Where one request's deltas go: a mailbox that belongs to the caller's event loop."""

    loop: asyncio.AbstractEventLoop
    mailbox: Mailbox
    tenant: str
    arrived: float  # seconds, `time.monotonic`


@dataclasses.dataclass(frozen=True)
class _Add:
    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams | None  # None: an embedding is wanted
    service: ServiceParams
    subscriber: _Subscriber
    rules: SamplingRules | None
    arrived: float  # time.monotonic


@dataclasses.dataclass(frozen=True)
class _Abort:
    request_id: str
    subscriber: _Subscriber | None = None  # only this caller's request; None: any caller's
    tenant: str | None = None  # likewise


class _Stop:
    pass


class AsyncEngine:
    """Runs an `Engine` on a background thread and hands its deltas to asyncio callers.

    Commands (add, abort) pass to the thread through one inbox, emptied before every step, so
    an abort frees its pages before the next step is planned. Deltas pass back in one
    `call_soon_threadsafe` per step and event loop, however many streams there are.

    Args:
        engine: the engine; from now on only the background thread touches it.

    Attributes:
        accounts: asked before a request is taken; None takes all.
        pulse: how long steps take, as a watchdog sees it.
    """

    def __init__(self, engine: Engine) -> None:
        self.accounts: Accounts | None = None
        self.pulse = Pulse()
        self._engine = engine
        self._inbox: queue.SimpleQueue[_Add | _Abort | _Stop] = queue.SimpleQueue()
        self._subscribers: dict[str, _Subscriber] = {}
        self._accepting = True
        self._num_open = 0  # generate() calls under way, on any event loop
        self._open_lock = threading.Lock()
        self._failure: BaseException | None = None
        self._rule_threads = ThreadPoolExecutor(MAX_RULE_THREADS, "jaxserve-rules")
        self._closed = False  # the thread reads the inbox no more
        self._thread = threading.Thread(target=self._run, name=ENGINE_THREAD, daemon=True)
        self._thread.start()

    # -- the asyncio face ---------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The served model's tokenizer."""
        return self._engine.tokenizer

    @property
    def model_info(self) -> ModelInfo:
        """Facts about the served model."""
        return self._engine.info

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken."""
        return self._accepting and self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        """Whether it still serves those requests that it has taken."""
        return self._thread.is_alive()

    @property
    def is_given_up(self) -> bool:
        """Whether `fail` was called: its thread is not expected to end."""
        return isinstance(self._failure, StepHung)

    @property
    def histogram(self) -> StepHistogram:
        """How large the steps were."""
        return self._engine.histogram

    @property
    def kv_events(self) -> EventLog:
        """KV pages stored and removed, in all tiers."""
        return self._engine.kv_events

    @property
    def records(self) -> EngineRecords:
        """The last steps and requests, and who is told of them."""
        return self._engine.records

    @property
    def has_store(self) -> bool:
        """Whether there is room for KV pages off the device."""
        return self._engine.has_store

    async def profile(self, seconds: float, directory: Path) -> None:
        """Record for some seconds what host and devices do; see `ProfileCapture.run`.

        Raises:
            InvalidRequest: no such length, one is under way, or there is no profiler.
            ConfigError: the directory cannot be made.
        """
        await self._engine.profiles.run(seconds, directory)

    def load(self) -> EngineLoad:
        """Gauges and counters as of now."""
        return self._engine.load()

    def active_requests(self) -> list[ActiveRequest]:
        """The requests under way, the oldest first; safe to call from any thread."""
        now = time.monotonic()
        active = [
            ActiveRequest(request_id, subscriber.tenant, now - subscriber.arrived)
            for request_id, subscriber in self._subscribers.copy().items()
        ]
        return sorted(active, key=lambda request: -request.seconds)

    def kv_map(self, max_bins: int) -> KvMap:
        """Where KV pages are as of now; see `Engine.kv_map`."""
        return self._engine.kv_map(max_bins)

    def generate(
        self,
        request_id: str | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        service: ServiceParams | None = None,
    ) -> AsyncGenerator[TokenDelta, None]:
        """Generate from a prompt, one delta per step; closing the iterator aborts.

        Args:
            request_id: unique among the active requests; None makes one up.
            prompt_token_ids: the prompt.
            params: how to sample and when to stop.
            service: its place among the others; default `ServiceParams()`.

        Raises:
            InvalidRequest, QueueFull, RateLimited, TargetMissed, Draining, EngineDead: before the
                first delta (EngineDead also later, if the engine fails while the request runs).
            RequestFailed: later, if the request itself cannot go on.
        """
        return self._deltas(request_id, prompt_token_ids, params, service)

    async def embed(
        self,
        request_id: str | None,
        prompt_token_ids: Sequence[int],
        service: ServiceParams | None = None,
    ) -> Embedding:
        """One vector for a text; cancelling the call aborts the request.

        Args:
            request_id: unique among the active requests; None makes one up.
            prompt_token_ids: the text's tokens.
            service: its place among the others; default `ServiceParams()`.

        Raises:
            InvalidRequest, QueueFull, RateLimited, TargetMissed, Draining, EngineDead: as
                `generate`.
            RequestFailed: it was aborted from outside.
        """
        deltas = self._deltas(request_id, prompt_token_ids, None, service)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                if delta.embedding is not None:
                    return delta.embedding
        raise RequestFailed("the request was aborted")

    async def _deltas(
        self,
        request_id: str | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | None,
        service: ServiceParams | None,
    ) -> AsyncGenerator[TokenDelta, None]:
        """The deltas of a generation, or without `params` the one of an embedding."""
        arrived = time.monotonic()
        if self._failure is not None:
            self._raise_dead()
        if not self._accepting:
            raise Draining("the server is shutting down and takes no new requests")
        request_id = request_id or f"req-{uuid.uuid4().hex}"
        service = service or ServiceParams()
        subscriber = _Subscriber(asyncio.get_running_loop(), Mailbox(), service.tenant, arrived)
        account = self._enter(service.tenant, len(prompt_token_ids))
        with self._open_lock:
            self._num_open += 1
        done = True  # nothing is to be aborted yet
        try:
            rules = await self._rules(params) if params is not None else None
            done = False
            self._inbox.put(
                _Add(request_id, prompt_token_ids, params, service, subscriber, rules, arrived)
            )
            if self._closed:  # maybe since before the put: then the inbox is not read any more
                self._raise_dead()
            while not done:
                item = await subscriber.mailbox.get()
                if isinstance(item, JaxserveError):
                    done = True
                    raise item
                done = item.finish_reason is not None
                if account is not None:
                    account.spend(len(item.token_ids))
                yield item
        finally:
            if not done:
                self._inbox.put(_Abort(request_id, subscriber))
            with self._open_lock:
                self._num_open -= 1
            if account is not None:
                account.leave()

    async def _rules(self, params: SamplingParams) -> SamplingRules | None:
        """The rules of a request's sampling, made where neither loop waits for it."""
        maker = self._engine.rule_maker
        if not maker.is_slow(params):
            return maker.make(params)
        try:
            future = self._rule_threads.submit(maker.make, params)
        except RuntimeError:  # shut down a moment ago
            self._raise_dead()
        return await asyncio.wrap_future(future)

    def abort(self, request_id: str, *, tenant: str | None = None) -> bool:
        """End a request from outside; its caller gets a last delta with reason ABORT.

        Args:
            request_id: which.
            tenant: only if it is this tenant's; None for any tenant's.

        Returns:
            Whether such a request was active. Safe to call from any thread.
        """
        subscriber = self._subscribers.get(request_id)
        self._inbox.put(_Abort(request_id, tenant=tenant))
        return subscriber is not None and tenant in (None, subscriber.tenant)

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new requests, wait for the running ones, then abort what is left.

        It returns in any case, if a step hangs some seconds after the grace.
        """
        self._accepting = False
        deadline = time.monotonic() + grace_seconds
        while self._num_open and time.monotonic() < deadline and self._thread.is_alive():
            await asyncio.sleep(0.02)
        deadline = time.monotonic() + self.patience
        while (
            self._thread.is_alive()
            and (self._subscribers or not self._inbox.empty())
            and time.monotonic() < deadline
        ):
            for request_id in list(self._subscribers):
                self.abort(request_id)
            await asyncio.sleep(0.005)

    @property
    def patience(self) -> float:
        """Seconds in which a step under way should end, by those before it."""
        return max(LEAST_PATIENCE, 2 * self.pulse.longest)

    def shutdown(self, timeout: float | None = None) -> bool:
        """Stop the thread; requests still running fail with EngineDead. Idempotent.

        Args:
            timeout: seconds to wait for the step under way, and for what is kept; None: as long
                as that takes.

        Returns:
            Whether the thread has ended.
        """
        self._accepting = False
        self._inbox.put(_Stop())
        self._rule_threads.shutdown(wait=False)  # those that wait are told by `_deltas`
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def fail(self, error: StepHung) -> None:
        """Give up a thread that does not come back: requests fail with this, and none are taken.

        Safe to call from any thread.
        """
        self._failure = error
        self._accepting = False
        self._closed = True
        self._fail_everyone(error)
        self._inbox.put(_Stop())

    def _enter(self, tenant: str, num_prompt_tokens: int) -> Account | None:
        return None if self.accounts is None else self.accounts.enter(tenant, num_prompt_tokens)

    def _raise_dead(self) -> NoReturn:
        if isinstance(self._failure, EngineDead):
            raise type(self._failure)(str(self._failure))
        raise EngineDead("the engine has stopped; see the server's log") from self._failure

    # -- the background thread ----------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self._engine.has_work:
                    with self.pulse.beat():
                        self._publish(self._engine.step(time.monotonic()))
            self._engine.close()
        except BaseException as error:  # of any kind: no caller may wait for ever
            self._failure = error
            log.exception("the engine loop failed")
        finally:
            self._accepting = False
            self._closed = True
            self._fail_everyone(EngineDead("the engine stopped while requests ran"))
            self._release()

    def _release(self) -> None:
        """Close the engine after a failure, so that its threads and its device come to rest."""
        try:
            self._engine.close()
        except Exception:
            log.exception("the engine that failed could not be closed")

    def _take_commands(self) -> bool:
        """Carry out what is in the inbox, waiting for something if idle; False to stop."""
        while True:
            try:
                command = self._inbox.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if isinstance(command, _Stop):
                return False
            if isinstance(command, _Add):
                self._add(command)
            else:
                self._abort(command)

    def _add(self, command: _Add) -> None:
        try:
            self._queue(command)
        except JaxserveError as error:
            self._deliver([(command.subscriber, error)])
        else:
            self._subscribers[command.request_id] = command.subscriber

    def _queue(self, command: _Add) -> None:
        request_id, prompt, service = command.request_id, command.prompt_token_ids, command.service
        if command.params is None:
            self._engine.add_embedding(request_id, prompt, service, now=command.arrived)
            return
        self._engine.add(
            request_id, prompt, command.params, service, now=command.arrived, rules=command.rules
        )

    def _abort(self, command: _Abort) -> None:
        subscriber = self._subscribers.get(command.request_id)
        if subscriber is None or command.subscriber not in (None, subscriber):
            return  # finished meanwhile, or the id is someone else's by now
        if command.tenant not in (None, subscriber.tenant):
            return
        delta = self._engine.abort(command.request_id)
        if delta is not None:
            self._publish([delta])

    def _publish(self, deltas: list[TokenDelta]) -> None:
        items: list[tuple[_Subscriber, TokenDelta | JaxserveError]] = []
        for delta in deltas:
            subscriber = self._subscribers.get(delta.request_id)
            if subscriber is None:  # told by `fail`, and the step has ended all the same
                continue
            items.append((subscriber, _error_of(delta) or delta))
            if delta.finish_reason is not None:
                self._subscribers.pop(delta.request_id, None)
        self._deliver(items)

    def _deliver(self, items: "list[tuple[_Subscriber, TokenDelta | JaxserveError]]") -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list] = {}
        for subscriber, item in items:
            by_loop.setdefault(subscriber.loop, []).append((subscriber.mailbox, item))
        for loop, batch in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, batch)
            except RuntimeError:  # the caller's event loop is closed, and its reader gone
                log.debug("dropped %d deltas of a closed event loop", len(batch))

    def _fail_everyone(self, error: EngineDead) -> None:
        waiting = list(self._subscribers.values())
        self._subscribers.clear()
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                break
            if isinstance(command, _Add):
                waiting.append(command.subscriber)
        for subscriber in waiting:
            self._deliver([(subscriber, error)])


def _error_of(delta: TokenDelta) -> JaxserveError | None:
    """What the caller is told instead of this delta."""
    return TargetMissed(_TOO_LATE) if delta.finish_reason is FinishReason.SHED else delta.error


def _put_all(batch: Sequence[tuple[Mailbox, TokenDelta | JaxserveError]]) -> None:
    for mailbox, item in batch:
        mailbox.put(item)
