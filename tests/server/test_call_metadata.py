"""Traces and request ids that come beside the message."""

from typing import Any

import pytest

from jaxserve.core.errors import InvalidRequest
from jaxserve.server.call_metadata import request_id, traceparent

GOOD = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Call:
    def __init__(self, **metadata: str | bytes) -> None:
        self._metadata = tuple((k.replace("_", "-"), v) for k, v in metadata.items())

    def invocation_metadata(self) -> Any:
        return self._metadata or None


def call(**metadata: str | bytes) -> Any:
    return Call(**metadata)


def test_request_ids() -> None:
    assert request_id("", call()) is None
    assert request_id("a" * 256, call()) == "a" * 256
    assert request_id("", call(x_request_id="theirs")) == "theirs"
    assert request_id("mine", call(x_request_id="theirs")) == "mine"
    for field, metadata in (("a" * 257, call()), ("", call(x_request_id="a" * 257))):
        with pytest.raises(InvalidRequest, match="257"):
            request_id(field, metadata)


@pytest.mark.parametrize("text", [GOOD, GOOD.replace("00-", "cc-", 1) + "-more"])
def test_traceparents(text: str) -> None:
    assert traceparent(call(traceparent=text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "x", GOOD.upper(), GOOD[:-1], GOOD + "0", GOOD.replace("00-", "ff-", 1), GOOD + "-" * 250,
     "00-" + "0" * 32 + GOOD[35:], GOOD[:36] + "0" * 16 + "-01", "\u0660" + GOOD[1:]],
)  # fmt: skip
def test_malformed_traceparents_are_ignored(text: str) -> None:
    assert traceparent(call(traceparent=text)) == ""
    assert traceparent(call()) == ""
