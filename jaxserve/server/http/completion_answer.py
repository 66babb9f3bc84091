"""A completion's answer, whole or as chunks, made of the engine's deltas."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import orjson

from jaxserve.core.errors import JaxserveError
from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.engine.outputs import TokenDelta
from jaxserve.server.http import logprobs
from jaxserve.server.http.fields import StreamOptions
from jaxserve.server.http.generation import Job
from jaxserve.server.http.sse import DONE, error_event
from jaxserve.server.http.usage import UsageCount


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionHead:
    """What is known of an answer before its first token.

    Attributes:
        id: of the answer.
        model: its name.
        names: what tokens are called.
        job: what the engine does.
        num_top: `logprobs` of the request; None for no log-probabilities.
        echoes: the texts of the prompts, if answers begin with them.
        with_prompt_logprobs: vLLM's `prompt_logprobs` are wanted.
        with_token_ids: token ids are wanted, too.
        created: seconds since 1970.
    """

    id: str
    model: str
    names: logprobs.TokenNames
    job: Job
    num_top: int | None = None
    echoes: Sequence[str] | None = None
    with_prompt_logprobs: bool = False
    with_token_ids: bool = False
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def fields(self) -> dict[str, Any]:
        """The fields that an answer, or each of its chunks, begins with."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }


class _Choice:
    """One choice: turns each delta into the fields that it adds."""

    def __init__(self, index: int, head: CompletionHead) -> None:
        self._head = head
        self._index = index
        self._prompt = index // head.job.n
        self._logprobs = None
        if head.num_top is not None:
            self._logprobs = logprobs.CompletionLogprobs(
                head.names,
                head.num_top,
                echo="" if head.echoes is None else head.echoes[self._prompt],
                skip_special_tokens=head.job.params.skip_special_tokens,
            )
        self.begun = False

    def push(self, delta: TokenDelta) -> dict[str, Any]:
        """The choice's object for a delta; its first one carries what comes of the prompt."""
        head = self._head
        text, reason = delta.text, delta.finish_reason
        first: dict[str, Any] = {}
        of_prompt: list[TokenLogprobs | int] = []
        if not self.begun:
            self.begun = True
            if head.echoes is not None:
                text = head.echoes[self._prompt] + text
                of_prompt = self._prompt_logprobs(delta)
            first = self._of_prompt(delta)
        scores = self._logprobs
        choice: dict[str, Any] = {
            "index": self._index,
            "text": text,
            "logprobs": None if scores is None else scores.of(of_prompt, delta.logprobs),
            "finish_reason": reason and reason.value,
            "stop_reason": delta.stop_reason,
            **first,
        }
        if head.with_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        return choice

    def _prompt_logprobs(self, delta: TokenDelta) -> list[TokenLogprobs | int]:
        if self._logprobs is None:
            return []
        return [self._head.job.prompts[self._prompt][0], *(delta.prompt_logprobs or ())]

    def _of_prompt(self, delta: TokenDelta) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if self._head.with_prompt_logprobs:
            scored = delta.prompt_logprobs or ()
            more["prompt_logprobs"] = logprobs.prompt_logprobs(scored, self._head.names)
        if self._head.with_token_ids:
            more["prompt_token_ids"] = self._head.job.prompts[self._prompt]
        return more


class CompletionAnswer:
    """Collects the deltas of all choices into one `text_completion`."""

    def __init__(self, head: CompletionHead) -> None:
        self._head = head
        self._choices = [_Choice(i, head) for i in range(head.job.num_choices)]
        self._objects: list[dict[str, Any] | None] = [None] * head.job.num_choices
        self._texts: list[list[str]] = [[] for _ in self._choices]
        self._usage = UsageCount(head.job.num_choices, head.job.n)

    def push(self, choice: int, delta: TokenDelta) -> None:
        """Take a delta."""
        self._usage.count(choice, delta)
        new = self._choices[choice].push(delta)
        self._texts[choice].append(new.pop("text"))
        old = self._objects[choice]
        if old is None:
            self._objects[choice] = new
            return
        if new["logprobs"] is not None:
            for name, values in new["logprobs"].items():
                if values is not None:
                    old["logprobs"][name] += values
        if "token_ids" in old:
            old["token_ids"] += new["token_ids"]
        old["finish_reason"], old["stop_reason"] = new["finish_reason"], new["stop_reason"]

    def finish(self) -> dict[str, Any]:
        """The answer."""
        choices = [
            {"text": "".join(texts), **(choice or {})}
            for texts, choice in zip(self._texts, self._objects, strict=True)
        ]
        return {**self._head.fields(), "choices": choices, "usage": self._usage.totals()}


class CompletionEvents:
    """Turns deltas into the events of a `text_completion` stream; see `EventWriter`.

    A chunk of nothing but text, which most are, is joined from ready-made bytes.

    Args:
        head: what all chunks have in common.
        options: whether usage is told.
    """

    def __init__(self, head: CompletionHead, options: StreamOptions | None) -> None:
        self._head = head
        self._with_usage = bool(options and options.include_usage)
        self._running_usage = self._with_usage and bool(options and options.continuous_usage_stats)
        self._choices = [_Choice(i, head) for i in range(head.job.num_choices)]
        self._usage = UsageCount(head.job.num_choices, head.job.n)
        start = b"data: " + orjson.dumps(head.fields())[:-1]
        usage = b',"usage":null' if self._with_usage else b""
        self._starts = [
            start + b',"choices":[{"index":%d,"text":' % i for i in range(head.job.num_choices)
        ]
        self._text_end = (
            b',"logprobs":null,"finish_reason":null,"stop_reason":null}]' + usage + b"}\n\n"
        )
        self._is_plain = not (
            self._running_usage or head.with_token_ids or head.num_top is not None
        )

    def push(self, choice: int, delta: TokenDelta) -> bytes:
        """The chunk of a delta; none for one without a text, if nothing else is wanted."""
        self._usage.count(choice, delta)
        if self._is_plain and self._choices[choice].begun and delta.finish_reason is None:
            if not delta.text:
                return b""
            return b"".join((self._starts[choice], orjson.dumps(delta.text), self._text_end))
        chunk = {**self._head.fields(), "choices": [self._choices[choice].push(delta)]}
        if self._with_usage:
            chunk["usage"] = self._usage.totals() if self._running_usage else None
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def finish(self) -> bytes:
        """The usage, if it is wanted, and the end."""
        if not self._with_usage:
            return DONE
        chunk = {**self._head.fields(), "choices": [], "usage": self._usage.totals()}
        return b"data: " + orjson.dumps(chunk) + b"\n\n" + DONE

    def fail(self, error: JaxserveError) -> bytes:
        """The error."""
        return error_event(error)
