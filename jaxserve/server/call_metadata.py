"""What a gRPC call says beside its message: whose trace it belongs to, and the request's id."""

import re
import uuid
from collections.abc import Iterable

import grpc

from jaxserve.core.errors import InvalidRequest

MAX_REQUEST_ID_CHARS = 256

# https://www.w3.org/TR/trace-context/#traceparent-header; later versions may add to the end.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")  # fmt: skip  # noqa: E501


def traceparent(context: grpc.aio.ServicerContext) -> str:
    """The caller's W3C trace context, or empty; a malformed one is ignored (so its standard)."""
    return valid_traceparent(_first(context, "traceparent"))


def valid_traceparent(text: str) -> str:
    """A trace context as it came, or empty if it is malformed."""
    return text if _TRACEPARENT.fullmatch(text) and len(text) <= MAX_REQUEST_ID_CHARS else ""


def request_id(field: str, context: grpc.aio.ServicerContext) -> str | None:
    """A caller's request id, or None if the server is to draw one.

    Args:
        field: what the message says; if that is empty, the metadata `x-request-id` counts.
        context: the call's.

    Raises:
        InvalidRequest: the id is too long.
    """
    text = field or _first(context, "x-request-id")
    if len(text) > MAX_REQUEST_ID_CHARS:
        raise InvalidRequest(
            f"request_id must have at most {MAX_REQUEST_ID_CHARS} characters, got {len(text)}",
            param="request_id",
        )
    return text or None


def new_request_id(prefix: str = "") -> str:
    """An id for a request that brings none, or one that need not be unique: then as a prefix."""
    return f"{prefix or 'req'}-{uuid.uuid4().hex}"


def _first(context: grpc.aio.ServicerContext, key: str) -> str:
    metadata: Iterable[tuple[str, str | bytes]] = context.invocation_metadata() or ()
    for name, value in metadata:
        if name == key and isinstance(value, str):
            return value
    return ""
