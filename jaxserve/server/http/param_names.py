"""Errors name the caller's parameter, whatever the engine calls it."""

import contextlib
import re
from collections.abc import Iterator, Mapping

from jaxserve.core.errors import InvalidRequest
from jaxserve.server.http.fields import SamplingFields

_GRAMMARS = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice",
    "guided_grammar",
)  # fmt: skip
_SAME: Mapping[str, str] = {}
_TARGETS = {"ttft_target": "ttft_target_ms", "tpot_target": "tpot_target_ms"}


@contextlib.contextmanager
def callers_names(body: SamplingFields, names: Mapping[str, str] = _SAME) -> Iterator[None]:
    """Give the errors raised within it the names of a request's parameters.

    Args:
        body: the request; a grammar's error is that of the field which has one, or of the tools.
        names: what this API calls a parameter of the engine, by the engine's name.

    Raises:
        InvalidRequest: as it was raised within, its `param` and message renamed.
    """
    try:
        yield
    except InvalidRequest as error:
        _rename(error, {**_TARGETS, "grammar": _grammar_param(body), **names})
        raise


def _grammar_param(body: SamplingFields) -> str:
    text = getattr(body, "text", None)
    if text is not None and text.format is not None:
        return "text.format"
    return next((name for name in _GRAMMARS if getattr(body, name, None) is not None), "tools")


def _rename(error: InvalidRequest, names: Mapping[str, str]) -> None:
    old = error.param or ""
    root = re.split(r"[.\[]", old, maxsplit=1)[0]
    new = names.get(root, root)
    if new == root:
        return
    error.param = new + old.removeprefix(root)
    message = str(error)
    if message.startswith(root):
        error.args = (new + message.removeprefix(root),)
