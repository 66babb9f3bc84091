"""An answer of the Responses API, whole or as events, made of the engine's deltas."""

import dataclasses
import time
from typing import Any

import orjson

from jaxserve.core.errors import JaxserveError
from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.request import FinishReason
from jaxserve.engine.outputs import TokenDelta
from jaxserve.server.http.errors import kind_of
from jaxserve.server.http.logprobs import TokenNames, response_logprobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResponseHead:
    """What is known of an answer before its first token.

    Attributes:
        id: of the answer, `resp_...`.
        model: its name.
        names: what tokens are called.
        settings: what the answer repeats of its request.
        created: seconds since 1970.
    """

    id: str
    model: str
    names: TokenNames
    settings: dict[str, Any]
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def message_id(self) -> str:
        """Of the answer's only message."""
        return "msg_" + self.id.removeprefix("resp_")


class ResponseAnswer:
    """Collects deltas into one `response`."""

    def __init__(self, head: ResponseHead) -> None:
        self._head = head
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._last: TokenDelta | None = None

    def push(self, choice: int, delta: TokenDelta) -> None:
        """Take a delta."""
        self._texts.append(delta.text)
        self._logprobs += delta.logprobs
        self._last = delta

    def finish(self) -> dict[str, Any]:
        """The answer, as it ended."""
        status = _status(self._last)
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self.begun(status),
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": cut,
            "output": [self.message(status)],
            "usage": _usage(self._last),
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

    def message(self, status: str | None = None) -> dict[str, Any]:
        """The only item of the output."""
        if status not in ("in_progress", "completed"):
            status = "incomplete"
        content = [] if status == "in_progress" else [self.part()]
        return {
            "id": self._head.message_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def part(self) -> dict[str, Any]:
        """The only part of the message: the text so far."""
        return {
            "type": "output_text",
            "text": "".join(self._texts),
            "annotations": [],
            "logprobs": response_logprobs(self._logprobs, self._head.names),
        }

    @property
    def status(self) -> str:
        """How the answer ended."""
        return _status(self._last)


class ResponseEvents:
    """Turns deltas into the events of a streamed response; see `EventWriter`.

    A delta's event is joined from ready-made bytes.
    """

    def __init__(self, head: ResponseHead) -> None:
        self._head = head
        self._answer = ResponseAnswer(head)
        self._number = 0  # of the next event
        self._place = {"item_id": head.message_id, "output_index": 0, "content_index": 0}
        self._delta_start = b"event: response.output_text.delta\ndata: " + orjson.dumps(
            {"type": "response.output_text.delta", **self._place}
        )[:-1]  # fmt: skip

    def push(self, choice: int, delta: TokenDelta) -> bytes:
        """The event of a delta's text, and all that come before the first one."""
        start = self._start() if not self._number else b""
        self._answer.push(choice, delta)
        if not delta.text and not delta.logprobs:
            return start
        logprobs = response_logprobs(delta.logprobs, self._head.names)
        event = b"".join(
            (
                start,
                self._delta_start,
                b',"delta":',
                orjson.dumps(delta.text),
                b',"logprobs":',
                orjson.dumps(logprobs),
                b',"sequence_number":%d}\n\n' % self._number,
            )
        )
        self._number += 1
        return event

    def finish(self) -> bytes:
        """The events that end the text, its part, its message and the response."""
        answer, place = self._answer, self._place
        part, status = answer.part(), answer.status
        done = {"text": part["text"], "logprobs": part["logprobs"]}
        last = "completed" if status == "completed" else "incomplete"
        return b"".join(
            (
                self._event("output_text.done", {**place, **done}),
                self._event("content_part.done", {**place, "part": part}),
                self._event(
                    "output_item.done", {"output_index": 0, "item": answer.message(status)}
                ),
                self._event(last, {"response": answer.finish()}),
            )
        )

    def fail(self, error: JaxserveError) -> bytes:
        """The response, failed."""
        failure = {"code": kind_of(error).code or "server_error", "message": str(error)}
        response = {**self._answer.begun("failed"), "error": failure}
        return self._event("failed", {"response": response})

    def _start(self) -> bytes:
        answer = self._answer
        item = {"output_index": 0, "item": answer.message("in_progress")}
        return b"".join(
            (
                self._event("created", {"response": answer.begun()}),
                self._event("in_progress", {"response": answer.begun()}),
                self._event("output_item.added", item),
                self._event("content_part.added", {**self._place, "part": answer.part()}),
            )
        )

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        kind = f"response.{name}"
        data = {"type": kind, **fields, "sequence_number": self._number}
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(data))


def _status(last: TokenDelta | None) -> str:
    reason = last and last.finish_reason
    if reason is FinishReason.STOP:
        return "completed"
    return "incomplete" if reason is FinishReason.LENGTH else "cancelled"


def _usage(last: TokenDelta | None) -> dict[str, Any] | None:
    if last is None:
        return None
    return {
        "input_tokens": last.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": last.num_cached_tokens},
        "output_tokens": last.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": last.num_prompt_tokens + last.num_output_tokens,
    }
