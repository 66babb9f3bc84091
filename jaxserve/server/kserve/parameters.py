"""Parameters of an inference request, from its own map or a JSON object, made the engine's."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.grammar import KINDS, Grammar
from jaxserve.core.sampling_defaults import SamplingDefaults
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.server.kserve import open_inference_pb2 as pb
from jaxserve.server.limits import RequestLimits
from jaxserve.server.strict import check_token_ids

DEFAULT_MAX_TOKENS = 256  # as in jaxserve.v1


class Parameters(NamedTuple):
    """What a request asks for beside its text; whether its `max_tokens` is its own."""

    sampling: SamplingParams
    service: ServiceParams
    asks_max_tokens: bool = False


def read_parameters(
    message: Mapping[str, pb.InferParameter],
    more: Mapping[str, Any],
    *,
    vocab_size: int,
    limits: RequestLimits,
    defaults: SamplingDefaults,
    traceparent: str = "",
) -> Parameters:
    """The engine's parameters; those not given take the model's defaults, then jaxserve.v1's.

    Names and meanings are those of jaxserve.v1's SamplingParams and ServiceParams. Numbers may
    come as strings, as Triton's clients send them, and one stop string for a list of one.

    Args:
        message: the request's parameters; they can be scalars only.
        more: the object of its input `sampling_parameters`, where lists and maps have a place.
        vocab_size: tokens are below it.
        limits: on single requests.
        defaults: the served model's.
        traceparent: of the call.

    Raises:
        InvalidRequest: a parameter is unknown, comes twice, or has a value that makes no sense.
    """
    given: dict[str, Any] = {}
    for name, parameter in message.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidRequest(f"parameter {name!r} has no value", param=name)
        given[name] = getattr(parameter, kind)
    for name, value in more.items():
        if name in given:
            raise InvalidRequest(f"parameter {name!r} comes twice", param=name)
        given[name] = value
    grammar = _take_grammar(given, limits)
    values = {name: _READERS[name](name, given[name]) for name in given if _is_known(name)}
    service = {name: values.pop(name) for name in _SERVICE if name in values}
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        check_token_ids(name, values.get(name, ()), vocab_size)
    asks_max_tokens = "max_tokens" in values
    values = {"max_tokens": DEFAULT_MAX_TOKENS, **defaults, **values}
    return Parameters(
        SamplingParams(grammar=grammar, **values),
        ServiceParams(traceparent=traceparent, **service),
        asks_max_tokens,
    )


def read_json(text: bytes, limits: RequestLimits) -> dict[str, Any]:
    """The object of the input `sampling_parameters`.

    Raises:
        InvalidRequest: it is none, or too long.
    """
    name = "sampling_parameters"
    limits.check("max_prompt_chars", len(text), name)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name} is not valid JSON: {error}", param=name) from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} must be a JSON object", param=name)
    return value


def _is_known(name: str) -> bool:
    if name not in _READERS:
        raise InvalidRequest(f"parameter {name!r} cannot be applied by this server", param=name)
    return True


def _take_grammar(given: dict[str, Any], limits: RequestLimits) -> Grammar | None:
    kinds = [kind for kind in KINDS if kind in given]
    if not kinds:
        return None
    if len(kinds) > 1:
        raise InvalidRequest(f"{kinds[0]} and {kinds[1]} exclude each other", param=kinds[1])
    [kind] = kinds
    value = given.pop(kind)
    if kind == "json_object":
        if not _bool(kind, value):
            raise InvalidRequest("json_object can only be true", param=kind)
        return Grammar("json_object")
    if kind == "choice":
        source = json.dumps(_strings(kind, value))
    elif kind == "json_schema" and not isinstance(value, str):
        source = json.dumps(value)
    else:
        source = _string(kind, value)
    limits.check("max_grammar_chars", len(source), kind)
    return Grammar(kind, source)


def _wrong(name: str, wanted: str, value: Any) -> InvalidRequest:
    return InvalidRequest(f"{name} must be {wanted}, not {str(value)[:100]!r}", param=name)


def _float(name: str, value: Any) -> float:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise _wrong(name, "a number", value)


def _int(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    elif isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    raise _wrong(name, "an integer", value)


def _bool(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise _wrong(name, "true or false", value)


def _string(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise _wrong(name, "a string", value)


def _strings(name: str, value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if isinstance(values, list) and all(isinstance(v, str) for v in values):
        return values
    raise _wrong(name, "a string or a list of strings", value)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, list):
        return tuple(_int(name, v) for v in value)
    raise _wrong(name, "a list of token ids", value)


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    if isinstance(value, dict):
        return {_int(name, token): _float(name, bias) for token, bias in value.items()}
    raise _wrong(name, "an object of biases by token id", value)


_SERVICE = ("tenant", "priority", "cache_salt")
_READERS: dict[str, Callable[[str, Any], Any]] = {
    "temperature": _float, "top_k": _int, "top_p": _float, "min_p": _float, "seed": _int,
    "max_tokens": _int, "stop": _strings, "stop_token_ids": _token_ids, "ignore_eos": _bool,
    "min_tokens": _int, "include_stop_str_in_output": _bool, "skip_special_tokens": _bool,
    "repetition_penalty": _float, "presence_penalty": _float, "frequency_penalty": _float,
    "logit_bias": _logit_bias, "allowed_token_ids": _token_ids, "bad_words": _strings,
    "tenant": _string, "priority": _int, "cache_salt": _string,
}  # fmt: skip
