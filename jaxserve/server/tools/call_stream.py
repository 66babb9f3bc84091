"""Finds calls in an answer that arrives in pieces."""

import dataclasses
import uuid
from collections.abc import Callable, Collection

from jaxserve.server.answer_events import (
    AnswerEvent,
    CallArguments,
    CallBegin,
    Content,
    held_back,
)
from jaxserve.server.tools.call_readers import CallReader, State
from jaxserve.server.tools.json_call_reader import JsonCallReader
from jaxserve.server.tools.python_call_reader import PythonCallReader


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallMarks:
    """Where in an answer a family of models writes calls.

    Attributes:
        openers: what stands before calls; an empty one is the call's own first character, `{` or
            `[`, and only found at the beginning.
        closers: what may stand after them.
        anywhere: an opener may stand anywhere in the text, not only at its beginning.
        has_python_calls: calls may look like Python's.
        are_tags: the markers, but for an empty one, stand for nothing but calls.
        glue: characters that may stand between calls, beside white space.
    """

    openers: tuple[str, ...]
    closers: tuple[str, ...] = ()
    anywhere: bool = False
    has_python_calls: bool = False
    are_tags: bool = False
    glue: str = "[],;"


_SURPLUS = "})"  # what models close once too often


def new_call_id() -> str:
    """An id that no other call has."""
    return f"call_{uuid.uuid4().hex[:24]}"


class CallStream:
    """Tells calls from content.

    Where nothing but white space stands around calls it is left out; all other text is content,
    and so is what looked like a call up to where its name and the beginning of its arguments
    should be. From there on it is a call, and reported while it is being written. Nothing is
    half of each: what belongs to a call is no content, tags that are not closed, surplus braces
    and keys included. Where a limit cuts an answer off, the beginning of a tag is dropped, and so
    is a call without a name; one with a name is a call whose arguments are as far as they came.

    Args:
        marks: where calls are.
        names: those of the tools; a call of another one is content.
        is_parallel: there may be several calls; otherwise what follows the first is dropped.
        new_id: makes ids of calls.

    Attributes:
        is_over: nothing that may follow matters any more.
    """

    def __init__(
        self,
        marks: CallMarks,
        names: Collection[str],
        *,
        is_parallel: bool = True,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self.is_over = False
        self._marks = marks
        self._tags = tuple(opener for opener in marks.openers if opener)
        self._names = names
        self._is_parallel = is_parallel
        self._new_id = new_id
        self._step = self._outside if marks.anywhere else self._at_beginning
        self._rest = ""  # not looked at yet
        self._held = ""  # white space that is content only if other content follows
        self._at_edge = True  # before all content, or right after a call
        self._block = ""  # what has been read since the opener, or since the block's last call
        self._block_has_call = False
        self._closes_late = False  # a text after calls has come where they should be closed
        self._is_cut = False
        self._reader: CallReader | None = None
        self._begun = False  # the call that is being read has been reported
        self._num_calls = 0
        self._events: list[AnswerEvent] = []

    def push(self, text: str) -> list[AnswerEvent]:
        """Take the next piece; what has become certain."""
        self._rest += text
        self._run(is_end=False)
        return self._taken_events()

    def finish(self, *, is_cut: bool = False) -> list[AnswerEvent]:
        """The text is over; what was held back."""
        self._is_cut = is_cut
        self._run(is_end=True)
        while not self._begun and self._step in (self._inside, self._reading):
            if is_cut and self._settle_cut():
                break
            self._leave_block()
            self._run(is_end=True)
        if self._begun:
            self._end_call()
        elif self._step == self._at_beginning:  # nothing but white space
            self._content(self._rest)
        if not self._num_calls and self._held:
            self._events.append(Content(self._held))
        return self._taken_events()

    def _settle_cut(self) -> bool:
        """Report the call that was cut off, if it has a name, or drop it, if it is one."""
        if self._reader is not None:
            self._reader.cut()
            if self._reader.name is not None:
                self._report(self._reader)
                return True
        has_tag = self._marks.are_tags and self._block.startswith(self._tags)
        is_call = self._block_has_call or has_tag
        if is_call:
            self._reader, self._block, self._step = None, "", self._outside
        return is_call

    def _run(self, *, is_end: bool) -> None:
        while self._rest and not self.is_over and self._step(is_end):
            pass

    def _taken_events(self) -> list[AnswerEvent]:
        events, self._events = self._events, []
        return events

    # Each step takes something off the rest, or says that it needs more text: False.

    def _at_beginning(self, is_end: bool) -> bool:
        """White space, then an opener, or all is content."""
        text = self._rest.lstrip()
        if not text or (not is_end and any(o != text and o.startswith(text) for o in self._tags)):
            return False
        found = max((o for o in self._tags if text.startswith(o)), key=len, default=None)
        if found is None and self._drops_halves and any(o.startswith(text) for o in self._tags):
            self._rest = ""
            return False
        if found is None and "" in self._marks.openers and text[0] in "{[":
            found = ""
        if found is None:
            self._step = self._outside
        else:
            self._content(self._rest[: len(self._rest) - len(text)])
            self._rest = text
            self._open(found)
        return True

    def _outside(self, is_end: bool) -> bool:
        """Content, up to an opener or what may become one; a closer that comes late is dropped."""
        openers = self._marks.openers if self._marks.anywhere else ()
        closers = self._marks.closers if self._closes_late else ()
        found = [(self._rest.find(m), m) for m in (*openers, *closers) if m in self._rest]
        if found:
            start, marker = min(found)
            self._take_content(start)
            if marker in openers:
                self._open(marker)
            else:
                self._rest = self._rest[len(marker) :]
                self._closes_late, self._at_edge = False, True
            return True
        size = 0
        if not is_end or self._drops_halves:
            size = held_back(self._rest, (*openers, *closers))
        return self._take_content(len(self._rest) - size)

    def _inside(self, is_end: bool) -> bool:
        """Before, between and after calls: one of them, a closer, glue, or it is over."""
        char = self._rest[0]
        closers = self._marks.closers
        closer = next((c for c in closers if self._rest.startswith(c)), None)
        if closer is not None:
            self._block += closer
            self._leave_block(closer)
        elif any(c.startswith(self._rest) for c in closers) and self._may_be_half(is_end):
            if is_end:
                self._rest = ""
            return False
        elif char.isspace() or char in self._marks.glue or self._is_surplus(char):
            self._block += char
            self._rest = self._rest[1:]
        elif char == "{":
            self._reader, self._step = JsonCallReader(self._names), self._reading
        elif self._marks.has_python_calls and (char.isalnum() or char in "_-"):
            self._reader, self._step = PythonCallReader(self._names), self._reading
        else:
            self._leave_block()
        return True

    @property
    def _drops_halves(self) -> bool:
        """Whether the beginning of a marker at the end is none of the text."""
        return self._is_cut and self._marks.are_tags

    def _may_be_half(self, is_end: bool) -> bool:
        """Whether the beginning of a closer, here, is one that is not complete yet, or was cut."""
        return not is_end or self._block_has_call or self._drops_halves

    def _is_surplus(self, char: str) -> bool:
        return self._block_has_call and char in _SURPLUS

    def _reading(self, is_end: bool) -> bool:
        """A call, as far as there is text."""
        reader = self._reader
        assert reader is not None
        size, closes = 0, False
        while size < len(self._rest) and reader.state is State.READING:
            closes = reader.may_close and self._closes_at(size)
            if closes:
                break
            size += reader.push(self._rest[size])
        self._rest = self._rest[size:]
        if reader.name is not None:
            self._report(reader)
        if reader.state is not State.READING:
            if self._begun:
                self._end_call()
            else:
                self._leave_block()
        elif closes:
            if not is_end and not self._rest.startswith(self._marks.closers):
                return False  # it may become one
            self._end_call()
        return True

    def _closes_at(self, start: int) -> bool:
        """Whether a closer, or at the end the beginning of one, stands there."""
        return any(
            closer.startswith(self._rest[start : start + len(closer)])
            for closer in self._marks.closers
        )

    def _report(self, reader: CallReader) -> None:
        if not self._begun:
            assert reader.name is not None
            self._begun = True
            self._held, self._at_edge = "", True
            self._events.append(CallBegin(self._num_calls, self._new_id(), reader.name))
        arguments = reader.take_arguments()
        if arguments:
            self._events.append(CallArguments(self._num_calls, arguments))

    def _end_call(self) -> None:
        self._num_calls += 1
        self._reader, self._begun = None, False
        self._block, self._block_has_call, self._step = "", True, self._inside
        if not self._is_parallel:
            self.is_over, self._rest = True, ""

    def _open(self, opener: str) -> None:
        self._block, self._block_has_call, self._step = opener, False, self._inside
        self._closes_late = False
        self._rest = self._rest[len(opener) :]

    def _leave_block(self, closer: str = "") -> None:
        """Back to content, which the block is, too, if no call came of it."""
        self._rest = self._rest[len(closer) :]
        self._closes_late = self._block_has_call and self._marks.are_tags and not closer
        if not self._block_has_call:
            self._content(self._block)
        if self._reader is not None:  # read it once more: there may be an opener in it
            self._rest = self._reader.source + self._rest
        self._block, self._block_has_call, self._reader = "", False, None
        self._step = self._outside

    def _take_content(self, size: int) -> bool:
        self._content(self._rest[:size])
        self._rest = self._rest[size:]
        return size > 0

    def _content(self, text: str) -> None:
        if self._at_edge:
            text = self._held + text
            if not text.strip():
                self._held = text
                return
            self._held, self._at_edge = "", False
        if text:
            self._events.append(Content(text))
