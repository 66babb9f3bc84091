"""What reads one call, character by character, and hands its arguments on as they are written.

One rule for all readers: a text is a call once its tool's name and the beginning of its arguments
are read. Before that anything unexpected breaks it, and it is no call; after that nothing does.
Arguments are handed on as they are written, so it could not be taken back.
"""

import enum
from typing import Protocol


class State(enum.Enum):
    """How far a call has come."""

    READING = "reading"
    COMPLETE = "complete"
    BROKEN = "broken"


class CallReader(Protocol):
    """Reads one call.

    Attributes:
        state: whether it is over, and how.
        name: the tool's, once it is certain that this is a call.
    """

    state: State
    name: str | None

    @property
    def source(self) -> str:
        """All characters so far."""
        ...

    @property
    def may_close(self) -> bool:
        """Whether what stands after calls would be that here, and not a part of a string."""
        ...

    def push(self, char: str) -> bool:
        """Take the next character; only while the state is READING.

        Returns:
            Whether the character is the call's; one that is not has ended it.
        """
        ...

    def cut(self) -> None:
        """The answer was cut off here: a name that has been read is enough."""
        ...

    def take_arguments(self) -> str:
        """The arguments' JSON text since the last time."""
        ...
