"""What all front ends of one server share: the engine, the limits, who is being answered."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

from jaxserve.core.errors import Draining, ModelNotFound
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.answer_plan import AnswerFormat, check_parsers
from jaxserve.server.limits import RequestLimits
from jaxserve.server.observability import Observability
from jaxserve.server.security.caller import own_requests_only
from jaxserve.server.security.keys import ApiKeys
from jaxserve.server.security.tenants import TenantAccounts


class ServerContext:
    """The state behind the gRPC and HTTP servers of one process; of one event loop.

    Args:
        limits: on single requests.
        keys: API keys of those who may call; None lets everybody.
        observability: what is told of the engine; default only metrics.
        tool_call_parser, reasoning_parser: how the model writes tool calls and thoughts: names
            of `server/tools` and `server/reasoning`.

    Attributes:
        limits, keys, observability: as given.

    Raises:
        ConfigError: there is no parser of a name given.
    """

    def __init__(
        self,
        limits: RequestLimits | None = None,
        keys: ApiKeys | None = None,
        observability: Observability | None = None,
        *,
        tool_call_parser: str = "auto",
        reasoning_parser: str = "none",
    ) -> None:
        check_parsers(tool_call_parser, reasoning_parser)
        self.limits = limits or RequestLimits()
        self.keys = keys
        self.observability = observability or Observability()
        self._parsers = (tool_call_parser, reasoning_parser)
        self._engine: AsyncEngine | None = None
        self._answers: dict[str, tuple[str, ...]] = {}  # of requests that have several
        self._num_answering = 0
        self._nobody = asyncio.Event()
        self._nobody.set()

    @property
    def engine(self) -> AsyncEngine | None:
        """None until it is ready; set once."""
        return self._engine

    @engine.setter
    def engine(self, engine: AsyncEngine | None) -> None:
        self._engine = engine
        if engine is None:
            return
        self.observability.attach(engine)
        if self.keys is not None:
            engine.accounts = TenantAccounts(self.keys.limits_of)

    def engine_for(self, model: str = "") -> AsyncEngine:
        """The engine that serves a model; empty for whatever is served.

        Raises:
            Draining: it is not ready yet.
            ModelNotFound: another model is served.
        """
        if self._engine is None:
            raise Draining("the server is still warming up")
        served = self._engine.model_info.name
        if model and model != served:
            raise ModelNotFound(f"model {model!r} is not served here; {served!r} is")
        return self._engine

    def answer_format(self) -> AnswerFormat:
        """How the served model writes tool calls and thoughts.

        Raises:
            Draining: there is no engine yet.
        """
        engine = self.engine_for()
        return AnswerFormat.of_model(*self._parsers, engine.tokenizer, engine.model_info.family)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count an answer as under way, so that a draining server waits for its last words."""
        self._num_answering += 1
        self._nobody.clear()
        try:
            yield
        finally:
            self._num_answering -= 1
            if not self._num_answering:
                self._nobody.set()

    @contextlib.contextmanager
    def several(self, request_id: str, answer_ids: Sequence[str]) -> Iterator[None]:
        """While inside, `abort` of a request ends all of its answers.

        Args:
            request_id: what the caller knows it by.
            answer_ids: what the engine knows them by.
        """
        if request_id in self._answers:  # another call's; the engine refuses the same ids again
            yield
            return
        self._answers[request_id] = tuple(answer_ids)
        try:
            yield
        finally:
            del self._answers[request_id]

    def abort(self, request_id: str) -> bool:
        """End a request, whichever front end it came by; whether it was active.

        One of another tenant than the caller's is as good as unknown.

        Raises:
            Draining: there is no engine yet.
        """
        engine, tenant = self.engine_for(), own_requests_only()
        ids = self._answers.get(request_id, (request_id,))
        return any([engine.abort(i, tenant=tenant) for i in ids])

    async def wait_idle(self, timeout: float) -> bool:
        """Wait until no answer is under way; whether that came before `timeout` seconds."""
        try:
            await asyncio.wait_for(self._nobody.wait(), timeout)
        except TimeoutError:
            return False
        return True
