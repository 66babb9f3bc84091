"""What a JSON value from outside may do to us: be huge, or nested without end."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MAX_DEPTH = 64


def is_too_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than `MAX_DEPTH` deep.

    Most that is done with a value recurses into it, and Python's stack is finite.
    """
    return any(depth > MAX_DEPTH for depth, _ in _walk(value))


def walk(value: Any) -> Iterator[Any]:
    """Every value inside, itself the first, however deep it is; keys are none."""
    return (inner for _, inner in _walk(value))


def num_chars(value: Any) -> int:
    """The characters of all strings in a value, without the keys; however deep it is."""
    return sum(len(inner) for inner in walk(value) if isinstance(inner, str))


def _walk(value: Any) -> Iterator[tuple[int, Any]]:
    """All values inside, the outermost first, and how many lists and objects they are in."""
    stack = [(0, value)]
    while stack:
        depth, inner = stack.pop()
        yield depth, inner
        if isinstance(inner, Mapping):
            stack += [(depth + 1, item) for item in inner.values()]
        elif isinstance(inner, Sequence) and not isinstance(inner, str | bytes):
            stack += [(depth + 1, item) for item in inner]
