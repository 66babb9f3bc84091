"""An answer of the Responses API, whole or as events, made of the engine's deltas."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from jaxserve.core.errors import JaxserveError
from jaxserve.core.request import FinishReason
from jaxserve.engine.outputs import TokenDelta
from jaxserve.server.answer_events import Content, TextReader
from jaxserve.server.http.errors import kind_of
from jaxserve.server.http.json_bytes import json_bytes
from jaxserve.server.http.logprobs import TokenNames
from jaxserve.server.http.response_items import OutputItems, Step
from jaxserve.server.reasoning.thought_tokens import ThoughtTokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResponseHead:
    """What is known of an answer before its first token.

    Attributes:
        id: of the answer, `resp_...`.
        model: its name.
        names: what tokens are called.
        settings: what the answer repeats of its request.
        reader: tells what is in the text, or None if it is all content.
        thoughts: counts thoughts, or None if there are none to be told apart.
        created: seconds since 1970.
    """

    id: str
    model: str
    names: TokenNames
    settings: dict[str, Any]
    reader: TextReader | None = None
    thoughts: ThoughtTokens | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))


class ResponseAnswer:
    """Collects deltas into one `response`."""

    def __init__(self, head: ResponseHead) -> None:
        self._head = head
        self._items = OutputItems(head.id.removeprefix("resp_"), head.names)
        self._last: TokenDelta | None = None

    def push(self, choice: int, delta: TokenDelta) -> None:
        """Take a delta."""
        self.take(delta)

    def take(self, delta: TokenDelta) -> list[Step]:
        """Take a delta; what to tell of it."""
        self._last = delta
        if self._head.thoughts is not None:
            self._head.thoughts.push(delta.token_ids)
        reader = self._head.reader
        if reader is not None:
            return self._items.take(reader.push(delta.text))
        if not delta.text and not delta.logprobs:
            return []
        return self._items.take([Content(delta.text)], delta.logprobs)

    def begin(self) -> list[Step]:
        """What is certain before the first token: that all is one message, if it is."""
        return self._items.open_message() if self._head.reader is None else []

    def end(self) -> list[Step]:
        """What there is to tell once all deltas are taken."""
        reader = self._head.reader
        steps: list[Step] = []
        if reader is not None:
            steps = self._items.take(reader.finish(is_cut=self.status != "completed"))
        return steps + self._items.finish(self.status)

    def finish(self) -> dict[str, Any]:
        """The answer, as it ended."""
        self.end()
        return self.ended()

    def ended(self) -> dict[str, Any]:
        """The answer after `end`."""
        status = self.status
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self.begun(status),
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": cut,
            "output": self._items.output(),
            "usage": _usage(self._last, self._head.thoughts),
        }

    def begun(self, status: str = "in_progress") -> dict[str, Any]:
        """The answer before its first token."""
        return {
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created,
            "status": status,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "model": self._head.model,
            "output": [],
            "usage": None,
            **self._head.settings,
        }

    @property
    def status(self) -> str:
        """How the answer ended."""
        return _status(self._last)


class ResponseEvents:
    """Turns deltas into the events of a streamed response; see `EventWriter`."""

    def __init__(self, head: ResponseHead) -> None:
        self._answer = ResponseAnswer(head)
        self._number = 0  # of the next event

    def push(self, choice: int, delta: TokenDelta) -> bytes:
        """The events of a delta, and all that come before the first one."""
        steps = [] if self._number else self._start()
        return self._events([*steps, *self._answer.take(delta)])

    def finish(self) -> bytes:
        """The events that end the last item and the response."""
        answer = self._answer
        steps = answer.end()
        last = "completed" if answer.status == "completed" else "incomplete"
        return self._events([*steps, Step(last, {"response": answer.ended()})])

    def fail(self, error: JaxserveError) -> bytes:
        """The response, failed."""
        failure = {"code": kind_of(error).code or "server_error", "message": str(error)}
        response = {**self._answer.begun("failed"), "error": failure}
        return self._events([Step("failed", {"response": response})])

    def _start(self) -> list[Step]:
        begun = {"response": self._answer.begun()}
        return [Step("created", begun), Step("in_progress", begun), *self._answer.begin()]

    def _events(self, steps: Sequence[Step]) -> bytes:
        return b"".join(map(self._event, steps))

    def _event(self, step: Step) -> bytes:
        kind = f"response.{step.name}"
        data = {"type": kind, **step.fields, "sequence_number": self._number}
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), json_bytes(data))


def _status(last: TokenDelta | None) -> str:
    reason = last and last.finish_reason
    if reason is FinishReason.STOP:
        return "completed"
    return "incomplete" if reason is FinishReason.LENGTH else "cancelled"


def _usage(last: TokenDelta | None, thoughts: ThoughtTokens | None) -> dict[str, Any] | None:
    if last is None:
        return None
    return {
        "input_tokens": last.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": last.num_cached_tokens},
        "output_tokens": last.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": thoughts.count if thoughts else 0},
        "total_tokens": last.num_prompt_tokens + last.num_output_tokens,
    }
