"""Values as JSON, those included that a caller made up."""

import json
from typing import Any

import orjson


def json_bytes(value: Any) -> bytes:
    """A value as JSON.

    Args:
        value: of anything that JSON has; parts of it may be a request's, given back.
    """
    try:
        return orjson.dumps(value)
    except TypeError:  # integers over 64 bits, halves of surrogate pairs
        return json.dumps(value).encode()
