"""Where in an answer calls are."""

import dataclasses
import functools
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallMarks:
    """Where in an answer a family of models writes calls.

    A marker that begins with `<` is a tag, which stands for nothing but calls. Others are fences,
    which stand around code as well.

    Attributes:
        pairs: what stands before calls, and what may stand after them, or nothing. An empty opener
            is the call's own first character, `{` or `[`, and only found at the beginning.
        anywhere: an opener may stand anywhere in the text, not only at its beginning.
        has_python_calls: calls may look like Python's.
        bare_needs_arguments: JSON without a tag around it is a call only if it has arguments.
        bare_is_exact: ... and if it is `{"name": ..., "arguments": {...}}`, with nothing before or
            between and nothing escaped, which is what a grammar can find in a text.
        glue: characters that may stand between calls, beside white space.
    """

    pairs: Mapping[str, str]
    anywhere: bool = False
    has_python_calls: bool = False
    bare_needs_arguments: bool = False
    bare_is_exact: bool = False
    glue: str = "[],;"

    @functools.cached_property
    def openers(self) -> tuple[str, ...]:
        """All openers but an empty one, the longest first."""
        return tuple(sorted(filter(None, self.pairs), key=len, reverse=True))

    @functools.cached_property
    def tags(self) -> tuple[str, ...]:
        """All markers that are tags."""
        return tuple(mark for mark in (*self.openers, *self.pairs.values()) if is_tag(mark))


def is_tag(marker: str) -> bool:
    """Whether a marker stands for nothing but calls."""
    return marker.startswith("<")
