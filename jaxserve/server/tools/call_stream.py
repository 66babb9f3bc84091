"""Finds calls in an answer that arrives in pieces."""

import uuid
from collections.abc import Callable, Collection, Sequence

from jaxserve.server.answer_events import (
    AnswerEvent,
    CallArguments,
    CallBegin,
    Content,
    held_back,
)
from jaxserve.server.tools.call_marks import CallMarks, is_tag
from jaxserve.server.tools.call_readers import CallReader, State
from jaxserve.server.tools.json_call_reader import JsonCallReader
from jaxserve.server.tools.python_call_reader import PythonCallReader

_SURPLUS = "})"  # what models close once too often


def new_call_id() -> str:
    """An id that no other call has."""
    return f"call_{uuid.uuid4().hex[:24]}"


class CallStream:
    """Tells calls from content.

    Where nothing but white space stands around calls it is left out; all other text is content, and
    so is what looked like a call up to where its name and the beginning of its arguments should be.
    From there on it is a call, and reported while it is being written. Nothing is half of each:
    what belongs to a call is no content, tags that are not closed, surplus braces and keys
    included. A fence with something else in it is content up to its end. Where a limit cuts an
    answer off, the beginning of a tag is dropped, and so is a call without a name; one with a name
    is a call whose arguments are as far as they came.

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
        self._names = names
        self._is_parallel = is_parallel
        self._new_id = new_id
        is_free = marks.anywhere and "" not in marks.pairs
        self._step = self._outside if is_free else self._at_beginning
        self._rest = ""  # not looked at yet
        self._held = ""  # white space that is content only if other content follows
        self._at_edge = True  # before all content, or right after a call
        self._block = ""  # what has been read since the opener, or since the block's last call
        self._block_has_call = False
        self._open_marks: list[str] = []  # the block's openers that are not closed
        self._fence = ""  # what ends the code that is content
        self._late_closers: tuple[str, ...] = ()  # tags that a text after calls came before
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
        is_call = self._block_has_call or any(map(is_tag, self._open_marks))
        if is_call:
            self._reader, self._block, self._step = None, "", self._outside
            self._open_marks = []
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
        text, openers = self._rest.lstrip(), self._marks.openers
        if not text or (not is_end and any(o != text and o.startswith(text) for o in openers)):
            return False
        found = next((o for o in openers if text.startswith(o)), None)
        if found is None and self._is_half_tag(text, openers):
            self._rest = ""
            return False
        if found is None and "" in self._marks.pairs and text[0] in "{[":
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
        if self._fence:  # code, in which tags are calls all the same
            openers = tuple(filter(is_tag, openers))
        markers = (*openers, *self._late_closers, *filter(None, [self._fence]))
        found = [(self._rest.find(m), -len(m), m) for m in markers if m in self._rest]
        if found:
            start, _, marker = min(found)
            rest = self._rest[start:]
            if not is_end and any(m != rest and m.startswith(rest) for m in markers):
                self._take_content(start)
                return False  # it may become a longer one
            self._take_content(start)
            if marker in openers:
                self._open(marker)
            elif marker == self._fence:
                self._take_content(len(marker))
                self._fence = ""
            else:
                self._rest = self._rest[len(marker) :]
                self._late_closers, self._at_edge = (), True
            return True
        size = 0
        if not is_end:
            size = held_back(self._rest, markers)
        elif self._is_cut:
            size = held_back(self._rest, tuple(filter(is_tag, markers)))
        return self._take_content(len(self._rest) - size)

    def _inside(self, is_end: bool) -> bool:
        """Before, between and after calls: one of them, a closer, glue, or it is over."""
        char = self._rest[0]
        closers = self._closers
        closer = next((c for c in closers if self._rest.startswith(c)), None)
        if closer is not None:
            self._close(closer)
        elif (tag := self._tag_in_fence(is_end)) is not None:
            if not tag:
                return False
            self._open_inside(tag)
        elif any(c.startswith(self._rest) for c in closers) and self._may_be_half(is_end):
            if is_end:
                self._rest = ""
            return False
        elif char.isspace() or char in self._marks.glue or self._is_surplus(char):
            self._block += char
            self._rest = self._rest[1:]
        elif char == "{":
            is_bare = not any(map(is_tag, self._open_marks))
            self._reader = JsonCallReader(
                self._names,
                needs_arguments=is_bare and self._marks.bare_needs_arguments,
                is_exact=is_bare and self._marks.bare_is_exact,
            )
            self._step = self._reading
        elif self._marks.has_python_calls and (char.isalnum() or char in "_-"):
            self._reader, self._step = PythonCallReader(self._names), self._reading
        else:
            self._leave_block()
        return True

    def _tag_in_fence(self, is_end: bool) -> str | None:
        """The opening tag that stands here, beside no other; an empty one if it may become one."""
        if not self._marks.anywhere or any(map(is_tag, self._open_marks)):
            return None
        tags = [opener for opener in self._marks.openers if is_tag(opener)]
        found = next((tag for tag in tags if self._rest.startswith(tag)), None)
        if found is None and not is_end and any(tag.startswith(self._rest) for tag in tags):
            return ""
        return found

    @property
    def _closers(self) -> tuple[str, ...]:
        """What may close the block, from the inside out."""
        closers = (self._marks.pairs[opener] for opener in reversed(self._open_marks))
        return tuple(filter(None, closers))

    def _close(self, closer: str) -> None:
        """Take a closer, with those inside of it that are missing."""
        self._block += closer
        self._rest = self._rest[len(closer) :]
        while self._open_marks:
            if self._marks.pairs[self._open_marks.pop()] == closer:
                break
        if not self._open_marks:
            self._leave_block(is_closed=True)

    def _is_half_tag(self, text: str, markers: Sequence[str]) -> bool:
        """Whether a limit cut off a tag of these after its beginning, which then is no text."""
        return self._is_cut and any(is_tag(m) and m.startswith(text) for m in markers)

    def _may_be_half(self, is_end: bool) -> bool:
        """Whether the beginning of a closer, here, is one that is not complete yet, or was cut."""
        return not is_end or self._block_has_call or self._is_half_tag(self._rest, self._closers)

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
            if not is_end and not self._rest.startswith(self._closers):
                return False  # it may become one
            self._end_call()
        return True

    def _closes_at(self, start: int) -> bool:
        """Whether a closer, or at the end the beginning of one, stands there."""
        return any(
            closer.startswith(self._rest[start : start + len(closer)]) for closer in self._closers
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
        self._open_marks, self._late_closers = [opener], ()
        self._rest = self._rest[len(opener) :]

    def _open_inside(self, opener: str) -> None:
        if self._block_has_call:  # what came before is no part of what may turn out to be no call
            self._block, self._block_has_call = "", False
        self._block += opener
        self._open_marks.append(opener)
        self._rest = self._rest[len(opener) :]

    def _leave_block(self, *, is_closed: bool = False) -> None:
        """Back to content, which the block is, too, if no call came of it."""
        closers = () if is_closed else self._closers
        if self._block_has_call:
            self._late_closers = tuple(filter(is_tag, closers))
        else:
            self._content(self._block)
        fences = (self._marks.pairs[o] for o in self._open_marks if o and not is_tag(o))
        self._fence = next(fences, self._fence)
        if self._reader is not None:  # read it once more: there may be an opener in it
            self._rest = self._reader.source + self._rest
        self._block, self._block_has_call, self._reader = "", False, None
        self._open_marks, self._step = [], self._outside

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
