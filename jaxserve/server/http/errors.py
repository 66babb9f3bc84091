"""Errors in OpenAI's shape, and which HTTP status each becomes: the one table."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from jaxserve.core import errors
from jaxserve.server.http.unsupported import UNSUPPORTED
from jaxserve.server.retry import retry_seconds

MAX_MESSAGE_CHARS = 1000  # a message that quotes the request could be huge


class Kind(NamedTuple):
    """What an error is over HTTP.

    Attributes:
        status: the HTTP status.
        type, code: the fields of OpenAI's error object.
    """

    status: int
    type: str
    code: str | None = None


KINDS: dict[type[errors.JaxserveError], Kind] = {
    errors.RequestTooLarge: Kind(413, "invalid_request_error", "request_too_large"),
    errors.UnsupportedMediaType: Kind(415, "invalid_request_error", "unsupported_media_type"),
    errors.InvalidRequest: Kind(400, "invalid_request_error"),
    errors.Unauthenticated: Kind(401, "invalid_request_error", "invalid_api_key"),
    errors.PermissionDenied: Kind(403, "invalid_request_error", "permission_denied"),
    errors.ModelNotFound: Kind(404, "invalid_request_error", "model_not_found"),
    errors.Unsupported: Kind(501, "server_error", "not_supported"),
    errors.RateLimited: Kind(429, "rate_limit_error", "rate_limit_exceeded"),
    errors.QueueFull: Kind(429, "rate_limit_error", "queue_full"),
    errors.TargetMissed: Kind(429, "rate_limit_error", "target_missed"),
    errors.RequestFailed: Kind(422, "invalid_request_error", "request_failed"),
    errors.Draining: Kind(503, "server_error", "unavailable"),
    errors.EngineDead: Kind(500, "server_error", "engine_dead"),
    errors.JaxserveError: Kind(500, "server_error"),
}
_BY_STATUS = {401: "invalid_api_key", 404: "unknown_url", 405: "method_not_allowed"}
INTERNAL = Kind(500, "server_error", "internal_error")


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer any more."""


def kind_of(error: errors.JaxserveError) -> Kind:
    """The kind of an error, by its nearest listed base class."""
    return next(KINDS[cls] for cls in type(error).__mro__ if cls in KINDS)


def error_object(kind: Kind, message: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error answer."""
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[: MAX_MESSAGE_CHARS - 3] + "..."
    return {"error": {"message": message, "type": kind.type, "param": param, "code": kind.code}}


def error_body(error: errors.JaxserveError) -> bytes:
    """A `JaxserveError` as the JSON that a client gets, in an answer or in a stream."""
    param = error.param if isinstance(error, errors.InvalidRequest) else None
    return _json(error_object(kind_of(error), str(error), param))


def response_to(error: errors.JaxserveError) -> Response:
    """The answer to a request that failed on purpose."""
    kind = kind_of(error)
    headers = {}
    seconds = retry_seconds(error)
    if seconds is not None:
        headers["Retry-After"] = str(seconds)
    if kind.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _response(kind.status, error_body(error), headers)


def response_to_http_exception(error: HTTPException) -> Response:
    """The answer where no route, or none of that method, is there; or a body cannot be read."""
    kind = Kind(error.status_code, "invalid_request_error", _BY_STATUS.get(error.status_code))
    body = _json(error_object(kind, str(error.detail)))
    return _response(error.status_code, body, error.headers or {})


def response_to_bug() -> Response:
    """The answer when we are to blame; it says nothing of the cause."""
    message = "internal error; see the server's log"
    return _response(INTERNAL.status, _json(error_object(INTERNAL, message)))


def response_to_validation(error: RequestValidationError) -> Response:
    """The answer to a body of the wrong shape, in the words of OpenAI where they are known."""
    return response_to(_as_invalid_request(error))


def _as_invalid_request(error: RequestValidationError) -> errors.InvalidRequest:
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        cause = first.get("ctx", {}).get("error", "")
        return errors.InvalidRequest(f"We could not parse the JSON body of your request: {cause}")
    unknown = [_path(p["loc"]) for p in problems if p["type"] == "extra_forbidden"]
    for name in unknown:
        if name in UNSUPPORTED:
            return errors.InvalidRequest(f"{name} is not supported", param=name)
    if unknown:
        plural = "s" if len(unknown) > 1 else ""
        return errors.InvalidRequest(
            f"Unrecognized request argument{plural} supplied: {', '.join(unknown)}",
            param=unknown[0],
        )
    path = _path(first["loc"])
    message = f"{path}: {first['msg']}" if path else str(first["msg"])
    return errors.InvalidRequest(message, param=path or None)


def _path(loc: tuple[int | str, ...]) -> str:
    """`messages[0].role` of ("body", "messages", 0, "role"); union members are left out."""
    path = ""
    for part in loc[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif "[" not in part and part not in ("str", "int", "float", "bool"):
            path += f".{part}" if path else part
    return path


def _response(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body, status, dict(headers or {}), media_type="application/json")


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()  # ASCII: a message may quote what is not valid Unicode
