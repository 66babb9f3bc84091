"""How log lines look: as text or as JSON, one line per event, with the request's id."""

import contextlib
import contextvars
import datetime
import json
import logging
from collections.abc import Iterator
from typing import Any

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")

# Told by default: a start may take minutes, and nothing of it comes from clients.
STARTING = (
    "jaxserve.engine", "jaxserve.runner", "jaxserve.models", "jaxserve.cache",
    "jaxserve.checkpoints", "jaxserve.core",
)  # fmt: skip

_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "request_id"}


@contextlib.contextmanager
def about_request(request_id: str | None) -> Iterator[None]:
    """Every line logged inside, and in tasks begun inside, names this request."""
    token = _request_id.set(request_id or "")
    try:
        yield
    finally:
        _request_id.reset(token)


class TextFormatter(logging.Formatter):
    """`time level logger: message [request id]`; what callers send cannot begin a new line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, without a traceback."""
        line = super().formatMessage(record)
        line += "".join(f" {key}={_shown(value)}" for key, value in _extras(record).items())
        request_id = _id_of(record)
        if request_id:
            line += f" [request {request_id}]"
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, request_id, and extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        fields: dict[str, Any] = {
            "time": at.isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = _id_of(record)
        if request_id:
            fields["request_id"] = request_id
        fields |= _extras(record)
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def _id_of(record: logging.LogRecord) -> str:
    return getattr(record, "request_id", "") or _request_id.get()


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    """What was passed as `extra`."""
    return {key: value for key, value in vars(record).items() if key not in _PLAIN}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if text and " " not in text else json.dumps(text)


def configure_logging(format: str, level: str | None) -> None:
    """Give all loggers one format, and jaxserve's a level.

    Args:
        format: one of `FORMATS`.
        level: one of `LEVELS`; None leaves what the command's -v has set, but that a start says
            what it does.
    """
    formatter = JsonFormatter() if format == "json" else TextFormatter()
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)
    whole = logging.getLogger("jaxserve")
    if level is not None:
        whole.setLevel(level.upper())
    logging.getLogger("jaxserve.engine.stages").setLevel(logging.NOTSET)  # as all of the engine
    for name in STARTING:
        tell = level is None and not whole.isEnabledFor(logging.INFO)
        logging.getLogger(name).setLevel(logging.INFO if tell else logging.NOTSET)
