"""The arguments of earlier tool calls, as an object, whatever the model said."""

from collections.abc import Mapping
from typing import Any

import pydantic_core

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.json_values import is_too_deep

# What models wrote that is no object stands under this key.
AS_TEXT = "arguments"


def read_arguments(given: Any, where: str) -> Mapping[str, Any]:
    """A call's arguments as an object.

    Arguments come as a text that a model wrote and that a limit may have cut off anywhere. What
    is whole of it is kept: `{"city": "Par` is `{"city": "Par"}`. A text that says nothing, or
    `null`, is an empty object, a JSON string with an object in it is that object, and any other
    text is the value of `AS_TEXT`, so that the model sees what it said.

    Args:
        given: the text; or an object, or None for none.
        where: it is in the request, for errors.

    Raises:
        InvalidRequest: it is none of these, or an object nested too deep.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        if is_too_deep(given):
            raise InvalidRequest(f"{where} is nested too deep", param=where)
        return given
    if not isinstance(given, str):
        raise InvalidRequest(f"{where} must be a JSON object, as text", param=where)
    if not given.strip():
        return {}
    value = _parsed(given)
    if isinstance(value, str):
        value = _parsed(value)
    if value is None:
        return {}
    if isinstance(value, Mapping) and not is_too_deep(value):
        return value
    return {AS_TEXT: given}


def _parsed(text: str) -> Any:
    """The JSON value of a text, or of as much of it as there is; False if it is none."""
    for allow_partial in (False, "trailing-strings"):
        try:
            return pydantic_core.from_json(text, allow_partial=allow_partial)
        except ValueError:
            continue
    return False
