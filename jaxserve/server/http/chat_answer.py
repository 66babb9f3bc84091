"""A chat's answer, whole or as chunks, made of the engine's deltas."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import orjson

from jaxserve.core.errors import JaxserveError
from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.request import FinishReason
from jaxserve.engine.outputs import TokenDelta
from jaxserve.server.http import logprobs
from jaxserve.server.http.fields import StreamOptions
from jaxserve.server.http.generation import Job
from jaxserve.server.http.message_parser import MessageParser, MessagePart, PlainText
from jaxserve.server.http.sse import DONE, error_event
from jaxserve.server.http.usage import UsageCount
from jaxserve.server.reasoning.thought_tokens import ThoughtTokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatHead:
    """What is known of an answer before its first token.

    Attributes:
        id: of the answer.
        model: its name.
        names: what tokens are called.
        job: what the engine does.
        parsers: one per choice.
        thoughts: one per choice, which counts its thoughts; none if there are none to tell.
        with_token_ids: token ids are wanted, too.
        echo: text that every choice begins with.
        created: seconds since 1970.
    """

    id: str
    model: str
    names: logprobs.TokenNames
    job: Job
    parsers: Sequence[MessageParser]
    thoughts: Sequence[ThoughtTokens] = ()
    with_token_ids: bool = False
    echo: str = ""
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def fields(self, kind: str) -> dict[str, Any]:
        """The fields that an answer, or each of its chunks, begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class ChatAnswer:
    """Collects the deltas of all choices into one `chat.completion`."""

    def __init__(self, head: ChatHead) -> None:
        self._head = head
        self._choices = [_Choice(parser, head.echo) for parser in head.parsers]
        self._usage = UsageCount(head.job.num_choices, head.job.n, thoughts=head.thoughts)
        self._prompt_logprobs: Sequence[TokenLogprobs] | None = None

    def push(self, choice: int, delta: TokenDelta) -> None:
        """Take a delta."""
        self._choices[choice].push(delta)
        self._usage.count(choice, delta)
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs

    def finish(self) -> dict[str, Any]:
        """The answer."""
        head = self._head
        answer = {
            **head.fields("chat.completion"),
            "choices": [c.finish(i, head) for i, c in enumerate(self._choices)],
            "usage": self._usage.totals(),
        }
        if head.job.params.prompt_logprobs is not None:
            answer["prompt_logprobs"] = logprobs.prompt_logprobs(
                self._prompt_logprobs or (), head.names
            )
        if head.with_token_ids:
            answer["prompt_token_ids"] = head.job.prompts[0]
        return answer


class _Choice:
    """One choice of a `ChatAnswer`."""

    def __init__(self, parser: MessageParser, echo: str) -> None:
        self._parser = parser
        self._content = [echo] if echo else []
        self._reasoning: list[str] = []
        self._tool_calls: dict[int, dict[str, Any]] = {}
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._last: TokenDelta | None = None

    def push(self, delta: TokenDelta) -> None:
        for part in self._parser.push(delta.text):
            self._add(part)
        self._token_ids += delta.token_ids
        self._logprobs += delta.logprobs
        self._last = delta

    def _add(self, part: MessagePart) -> None:
        if part.content:
            self._content.append(part.content)
        if part.reasoning:
            self._reasoning.append(part.reasoning)
        if part.tool_call is not None:
            piece = part.tool_call
            call = self._tool_calls.setdefault(
                piece.index,
                {"id": "", "type": "function", "function": {"name": "", "arguments": ""}},
            )
            call["id"] += piece.id
            call["function"]["name"] += piece.name
            call["function"]["arguments"] += piece.arguments

    def finish(self, index: int, head: ChatHead) -> dict[str, Any]:
        reason = self._last and self._last.finish_reason
        for part in self._parser.finish(is_cut=reason is not FinishReason.STOP):
            self._add(part)
        choice: dict[str, Any] = {
            "index": index,
            "message": self._message(),
            "logprobs": None,
            "finish_reason": reason and self._parser.finish_reason(reason.value),
            "stop_reason": self._last and self._last.stop_reason,
        }
        if head.job.params.logprobs is not None:
            choice["logprobs"] = logprobs.chat_logprobs(self._logprobs, head.names)
        if head.with_token_ids:
            choice["token_ids"] = self._token_ids
        return choice

    def _message(self) -> dict[str, Any]:
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
            message["content"] = content or None
        if self._tool_calls:
            message["tool_calls"] = [call for _, call in sorted(self._tool_calls.items())]
            message["content"] = content or None
        return message


class ChatEvents:
    """Turns deltas into the events of a `chat.completion.chunk` stream; see `EventWriter`.

    A chunk of nothing but text, which most are, is joined from ready-made bytes.

    Args:
        head: what all chunks have in common.
        options: whether usage is told.
    """

    def __init__(self, head: ChatHead, options: StreamOptions | None) -> None:
        self._head = head
        self._with_usage = bool(options and options.include_usage)
        self._running_usage = self._with_usage and bool(options and options.continuous_usage_stats)
        self._usage = UsageCount(head.job.num_choices, head.job.n, thoughts=head.thoughts)
        self._begun = [False] * head.job.num_choices
        start = b"data: " + orjson.dumps(head.fields("chat.completion.chunk"))[:-1]
        usage = b',"usage":null' if self._with_usage and not self._running_usage else b""
        self._starts = [
            start + b',"choices":[{"index":%d,"delta":' % i for i in range(head.job.num_choices)
        ]
        self._text_end = b'},"logprobs":null,"finish_reason":null}]' + usage + b"}\n\n"
        self._is_plain = [
            isinstance(parser, PlainText)
            and not self._running_usage
            and not head.with_token_ids
            and head.job.params.logprobs is None
            for parser in head.parsers
        ]

    def push(self, choice: int, delta: TokenDelta) -> bytes:
        """The chunks of a delta: a role first, then text, at the end the finish reason."""
        self._usage.count(choice, delta)
        if self._begun[choice] and self._is_plain[choice] and delta.finish_reason is None:
            return self._text(choice, delta.text) if delta.text else b""
        return self._in_full(choice, delta)

    def finish(self) -> bytes:
        """The usage, if it is wanted, and the end."""
        if not self._with_usage:
            return DONE
        chunk = {
            **self._head.fields("chat.completion.chunk"),
            "choices": [],
            "usage": self._usage.totals(),
        }
        return b"data: " + orjson.dumps(chunk) + b"\n\n" + DONE

    def fail(self, error: JaxserveError) -> bytes:
        """The error."""
        return error_event(error)

    def _text(self, choice: int, text: str) -> bytes:
        return b"".join((self._starts[choice], b'{"content":', orjson.dumps(text), self._text_end))

    def _in_full(self, choice: int, delta: TokenDelta) -> bytes:
        chunks: list[bytes] = []
        if not self._begun[choice]:
            self._begun[choice] = True
            chunks.append(self._first(choice, delta))
        parser = self._head.parsers[choice]
        parts = parser.push(delta.text)
        if delta.finish_reason is not None:
            parts += parser.finish(is_cut=delta.finish_reason is not FinishReason.STOP)
        extras = self._extras(delta)
        if extras and not parts:
            parts = [MessagePart()]
        for i, part in enumerate(parts):
            # Tokens are told of once, with the first of the parts that they made.
            chunks.append(self._chunk(choice, _delta_object(part), extras if i == 0 else {}))
        if delta.finish_reason is not None:
            reason = parser.finish_reason(delta.finish_reason.value)
            last = {"finish_reason": reason, "stop_reason": delta.stop_reason}
            chunks.append(self._chunk(choice, {}, last))
        return b"".join(chunks)

    def _first(self, choice: int, delta: TokenDelta) -> bytes:
        more: dict[str, Any] = {}
        if self._head.with_token_ids:
            more["prompt_token_ids"] = self._head.job.prompts[0]
        if delta.prompt_logprobs is not None:
            more["prompt_logprobs"] = logprobs.prompt_logprobs(
                delta.prompt_logprobs, self._head.names
            )
        role = {"role": "assistant", "content": ""}
        chunk = self._chunk(choice, role, {}, more)
        return chunk + (self._text(choice, self._head.echo) if self._head.echo else b"")

    def _extras(self, delta: TokenDelta) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if delta.logprobs:
            extras["logprobs"] = logprobs.chat_logprobs(delta.logprobs, self._head.names)
        if self._head.with_token_ids:
            extras["token_ids"] = delta.token_ids
        return extras

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        extras: dict[str, Any],
        more: dict[str, Any] | None = None,
    ) -> bytes:
        chunk: dict[str, Any] = {
            **self._head.fields("chat.completion.chunk"),
            "choices": [
                {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None, **extras}
            ],
            **(more or {}),
        }
        if self._with_usage:
            chunk["usage"] = self._usage.totals() if self._running_usage else None
        return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _delta_object(part: MessagePart) -> dict[str, Any]:
    if part.tool_call is not None:
        call = part.tool_call
        function: dict[str, Any] = {"arguments": call.arguments}
        if call.name:
            function = {"name": call.name, **function}
        start = {"id": call.id, "type": "function"} if call.id else {}
        return {"tool_calls": [{"index": call.index, **start, "function": function}]}
    if part.reasoning:
        return {"reasoning_content": part.reasoning}
    return {"content": part.content}
