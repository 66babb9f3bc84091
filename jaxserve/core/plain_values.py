"""What callers hand in, as plain ints, floats, booleans and strings, or refused by name.

NumPy's (and JAX's) integers count as integers wherever one is asked for; a boolean never does, and
a float does not, not even one without a fraction: it is most likely an array of the wrong type.
"""

import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.json_values import walk

_SHOWN_CHARS = 60


def integer(field: str, value: Any) -> int:
    """An integer of any size.

    Raises:
        InvalidRequest: it is none.
    """
    if type(value) is int:
        return value
    if not _is_boolean(value):
        try:
            return operator.index(value)
        except TypeError:  # a float, say, or an array of several
            pass
    _refuse(field, "an integer", value)


def number(field: str, value: Any) -> float:
    """A float, from any real number; it may be infinite or NaN.

    Raises:
        InvalidRequest: it is no number, or too large for a float.
    """
    if type(value) is float:
        return value
    if not _is_boolean(value) and not isinstance(value, str | bytes | complex):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    _refuse(field, "a number", value)


def boolean(field: str, value: Any) -> bool:
    """A boolean.

    Raises:
        InvalidRequest: it is none.
    """
    if not _is_boolean(value):
        _refuse(field, "true or false", value)
    return bool(value)


def string(field: str, value: Any) -> str:
    """A string that can be written as UTF-8.

    Raises:
        InvalidRequest: it is none.
    """
    if not isinstance(value, str):
        _refuse(field, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{field} is not valid Unicode", param=field) from None
    return value


def listed(field: str, values: Any) -> list[Any]:
    """The elements of a sequence or an array; not of a string or a mapping.

    Raises:
        InvalidRequest: it is none.
    """
    if not isinstance(values, str | bytes | Mapping) and isinstance(values, Iterable):
        try:
            return list(values)
        except TypeError:  # an array without axes
            pass
    _refuse(field, "a list", values)


def integers(field: str, values: Any) -> list[int]:
    """A list of integers, also from an array of them.

    Raises:
        InvalidRequest: it is none, or an element is no integer.
    """
    items = listed(field, values)
    if set(map(type, items)) <= {int}:
        return items
    return [integer(field, item) for item in items]


def json_value(field: str, value: Any) -> Any:
    """A value that JSON can hold, as it is, however deep; tuples and other sequences are lists.

    Raises:
        InvalidRequest: something in it is neither text, number, boolean, list, object nor null.
    """
    for inner in walk(value):
        plain = inner is None or isinstance(inner, str | int | float | Mapping)
        if not plain and (isinstance(inner, bytes) or not isinstance(inner, Sequence)):
            _refuse(field, "what JSON can hold", inner)
    return value


def _is_boolean(value: Any) -> bool:
    numpy = sys.modules.get("numpy")  # not imported for this: `jaxserve --help` needs none
    return isinstance(value, bool) or (numpy is not None and isinstance(value, numpy.bool_))


def _refuse(field: str, wanted: str, value: Any) -> NoReturn:
    raise InvalidRequest(
        f"{field} must be {wanted}, got {shown(value)} ({type(value).__name__})", param=field
    )


def shown(value: Any) -> str:
    """A value as messages show it: its beginning, if it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number that is too large"
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."
