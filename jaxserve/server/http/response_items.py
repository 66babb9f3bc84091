"""The output items of the Responses API: a message, thoughts, calls; one after the other."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.server.answer_events import (
    AnswerEvent,
    CallArguments,
    CallBegin,
    Content,
    Reasoning,
)
from jaxserve.server.http.logprobs import TokenNames, response_logprobs

# By kind of item: its id's prefix, its part's type, and the events of its text.
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}
_TEXT_EVENTS = {**_PARTS, "function_call": "function_call_arguments"}


class Step(NamedTuple):
    """An event of a stream, without its number.

    Attributes:
        name: after `response.`.
        fields: beside the type.
    """

    name: str
    fields: dict[str, Any]


@dataclasses.dataclass
class _Item:
    """An item of the output, as far as it has come."""

    kind: str
    id: str
    index: int
    call: CallBegin | None = None
    texts: list[str] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    status: str = "in_progress"

    @property
    def place(self) -> dict[str, Any]:
        place = {"item_id": self.id, "output_index": self.index}
        return place if self.call is not None else {**place, "content_index": 0}


class OutputItems:
    """Builds the items of one answer of what it is read as.

    Args:
        answer_id: from which the items' ids are made.
        names: what tokens are called.
    """

    def __init__(self, answer_id: str, names: TokenNames) -> None:
        self._answer_id = answer_id
        self._names = names
        self._items: list[_Item] = []

    def take(
        self, events: Sequence[AnswerEvent], logprobs: Sequence[TokenLogprobs] = ()
    ) -> list[Step]:
        """Go on with what has been read; what to tell of it.

        Args:
            events: what has been read.
            logprobs: of the tokens of a text, where it is all content.
        """
        steps: list[Step] = []
        for event in events:
            if isinstance(event, Content):
                steps += self._add("message", event.text, logprobs)
            elif isinstance(event, Reasoning):
                steps += self._add("reasoning", event.text)
            elif isinstance(event, CallBegin):
                steps += self._open("function_call", event)
            elif isinstance(event, CallArguments):
                steps += self._add("function_call", event.text)
        return steps

    def open_message(self) -> list[Step]:
        """Begin a message, of which nothing is known yet."""
        return self._open("message")

    def finish(self, status: str) -> list[Step]:
        """End the last item, with the answer's status; an answer without items gets a message."""
        steps = [] if self._items else self.open_message()
        return steps + self._close("completed" if status == "completed" else "incomplete")

    def output(self) -> list[dict[str, Any]]:
        """All items."""
        return [self._object(item) for item in self._items]

    def _add(self, kind: str, text: str, logprobs: Sequence[TokenLogprobs] = ()) -> list[Step]:
        steps = []
        if not self._items or self._items[-1].kind != kind:
            steps = self._open(kind)
        item = self._items[-1]
        item.texts.append(text)
        item.logprobs += logprobs
        fields = {**item.place, "delta": text}
        if kind == "message":
            fields["logprobs"] = response_logprobs(logprobs, self._names)
        return [*steps, Step(f"{_TEXT_EVENTS[kind]}.delta", fields)]

    def _open(self, kind: str, call: CallBegin | None = None) -> list[Step]:
        steps = self._close("completed")
        count = sum(item.kind == kind for item in self._items)
        item_id = f"{_PREFIXES[kind]}_{self._answer_id}" + (f"-{count}" if count else "")
        item = _Item(kind, item_id, len(self._items), call)
        self._items.append(item)
        added = {"output_index": item.index, "item": self._object(item)}
        steps.append(Step("output_item.added", added))
        if call is None:
            part = {**item.place, "part": self._part(item)}
            steps.append(Step("content_part.added", part))
        return steps

    def _close(self, status: str) -> list[Step]:
        if not self._items:
            return []
        item = self._items[-1]
        item.status = status
        text = {"text": "".join(item.texts)}
        steps = []
        if item.call is not None:
            text = {"arguments": text["text"], "name": item.call.name}
        elif item.kind == "message":
            text["logprobs"] = self._part(item)["logprobs"]
        steps.append(Step(f"{_TEXT_EVENTS[item.kind]}.done", {**item.place, **text}))
        if item.call is None:
            part = {**item.place, "part": self._part(item)}
            steps.append(Step("content_part.done", part))
        done = {"output_index": item.index, "item": self._object(item)}
        return [*steps, Step("output_item.done", done)]

    def _object(self, item: _Item) -> dict[str, Any]:
        start = {"id": item.id, "type": item.kind, "status": item.status}
        if item.call is not None:
            call = {"call_id": item.call.call_id, "name": item.call.name}
            return {**start, **call, "arguments": "".join(item.texts)}
        content = [] if item.status == "in_progress" else [self._part(item)]
        if item.kind == "reasoning":
            return {**start, "summary": [], "content": content}
        return {**start, "role": "assistant", "content": content}

    def _part(self, item: _Item) -> dict[str, Any]:
        part = {"type": _PARTS[item.kind], "text": "".join(item.texts)}
        if item.kind == "reasoning":
            return part
        logprobs = response_logprobs(item.logprobs, self._names)
        return {**part, "annotations": [], "logprobs": logprobs}
