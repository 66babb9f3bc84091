"""The fields that requests have in common, and what the engine makes of them."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Discriminator, Field, Tag

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.grammar import Grammar
from jaxserve.core.sampling_params import MAX_SEED, SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.engine.outputs import ModelInfo
from jaxserve.server.http.unsupported import without_neutral
from jaxserve.server.limits import RequestLimits

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Number = Annotated[float, Field(allow_inf_nan=False)]
TokenIds = Annotated[
    list[TokenId], Field(fail_fast=True)
]  # one complaint, whatever a list of millions has
Strings = Annotated[list[str], Field(fail_fast=True)]


def _form_of_prompt(value: Any) -> str:
    """Which form a prompt has, by its first element: trying all of them takes long."""
    if not isinstance(value, list):
        return "[text]"
    first = value[0] if value else ""
    if isinstance(first, str):
        return "[texts]"
    return "[lists of ids]" if isinstance(first, list) else "[ids]"


Prompt = Annotated[
    Annotated[str, Tag("[text]")]
    | Annotated[Strings, Tag("[texts]")]
    | Annotated[TokenIds, Tag("[ids]")]
    | Annotated[list[TokenIds], Field(fail_fast=True), Tag("[lists of ids]")],
    Discriminator(_form_of_prompt),
]


class Body(pydantic.BaseModel):
    """A request's body: no conversions, no fields that we do not know."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        return without_neutral(data, frozenset(cls.model_fields))


class StreamOptions(Body):
    """What a stream has beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchemaFormat(Body):
    """OpenAI's named JSON schema."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer must look like, in OpenAI's terms."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Body):
    """What the answer must look like, in vLLM's terms: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Strings | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None


class ServiceFields(Body):
    """What every request to the model may have; null is the same as not given, here and below."""

    model: str | None = None
    user: str | None = None  # this and the next two do nothing to an answer at OpenAI either
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # As in vLLM
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    # Our own, as in jaxserve.v1
    tenant: str | None = None
    ttft_target_ms: Number | None = None
    tpot_target_ms: Number | None = None


class SamplingFields(ServiceFields):
    """How an answer is sampled."""

    temperature: Number | None = None
    top_p: Number | None = None
    stop: str | Strings | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    # As in vLLM
    top_k: int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    min_tokens: int | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Strings | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Strings | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None


class GenerationFields(SamplingFields):
    """What chat and completion requests share."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    response_format: ResponseFormat | None = None
    # As in vLLM
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


_SAME_NAMES = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "min_tokens", "ignore_eos", "include_stop_str_in_output",
    "skip_special_tokens",
)  # fmt: skip


def sampling_params(
    body: SamplingFields,
    info: ModelInfo,
    limits: RequestLimits,
    *,
    max_tokens: int | None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """The engine's sampling parameters.

    Args:
        body: the request.
        info: of the served model.
        limits: on grammars.
        max_tokens: tokens to generate; None: as the model's defaults say, else to the end of
            the context.
        logprobs, prompt_logprobs: as in `SamplingParams`.
        grammar: one that is not among these fields, such as that of a response format.

    Raises:
        InvalidRequest: a value is out of range, or there are several grammars.
    """
    given: dict[str, Any] = dict(info.default_sampling_params)
    given |= {name: value for name in _SAME_NAMES if (value := getattr(body, name)) is not None}
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    given.setdefault("max_tokens", None)
    for name in ("stop_token_ids", "allowed_token_ids"):
        ids = getattr(body, name)
        if ids is not None:
            _check_vocabulary(name, ids, info)
            given[name] = tuple(ids)
    if body.seed is not None:
        given["seed"] = body.seed & MAX_SEED  # a negative one is as good as any
    if body.logit_bias:
        given["logit_bias"] = _logit_bias(body.logit_bias, info)
    if body.bad_words:
        given["bad_words"] = tuple(body.bad_words)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return SamplingParams(
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop=tuple(stop),
        grammar=_laid_out(_only_grammar([grammar, *_grammars(body)], limits), body),
        **given,
    )


def _only_grammar(given: Sequence[Grammar | None], limits: RequestLimits) -> Grammar | None:
    grammars = [grammar for grammar in given if grammar is not None]
    if len(grammars) > 1:
        raise InvalidRequest(
            "only one grammar, schema or choice can shape an answer", param="grammar"
        )
    for grammar in grammars:
        limits.check("max_grammar_chars", len(grammar.source), "the grammar's characters")
    return grammars[0] if grammars else None


def _laid_out(grammar: Grammar | None, body: SamplingFields) -> Grammar | None:
    """The grammar with what the request says about blanks in JSON."""
    structured = body.structured_outputs or StructuredOutputs()
    given = {
        "guided_whitespace_pattern": body.guided_whitespace_pattern,
        "structured_outputs.whitespace_pattern": structured.whitespace_pattern,
        "structured_outputs.disable_any_whitespace": (
            "" if structured.disable_any_whitespace else None
        ),
    }
    said = {param: pattern for param, pattern in given.items() if pattern is not None}
    for param in said:
        if len(said) > 1:
            raise InvalidRequest(f"{param}: there is more than one such field", param=param)
        if grammar is None or not grammar.kind.startswith("json"):
            raise InvalidRequest(f"{param} is for answers of a JSON form", param=param)
        return dataclasses.replace(grammar, whitespace=said[param])
    return grammar


def service_params(body: ServiceFields, traceparent: str) -> ServiceParams:
    """The engine's service parameters.

    Args:
        body: the request.
        traceparent: the request's header of that name.

    Raises:
        InvalidRequest: a value is out of range.
    """
    return ServiceParams(
        tenant=body.tenant or "",
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        ttft_target=None if body.ttft_target_ms is None else body.ttft_target_ms / 1000,
        tpot_target=None if body.tpot_target_ms is None else body.tpot_target_ms / 1000,
        traceparent=traceparent,
    )


def check_stream_options(body: GenerationFields) -> None:
    """Refuse stream options of an answer that is no stream, as OpenAI does.

    Raises:
        InvalidRequest: there are some.
    """
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest(
            "stream_options is only allowed when stream is true", param="stream_options"
        )


def schema_grammar(
    schema: dict[str, Any] | bool | str | None, param: str, *, is_strict: bool = False
) -> Grammar:
    """A JSON schema, as an object or as its text.

    Args:
        schema: as it came.
        param: the request's field, for messages.
        is_strict: see `Grammar`.

    Raises:
        InvalidRequest: there is none.
    """
    if schema is None:
        raise InvalidRequest(f"{param} is missing", param=param)
    try:
        source = schema if isinstance(schema, str) else json.dumps(schema)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{param} is not a JSON schema", param=param) from error
    return Grammar("json_schema", source, is_strict=is_strict)


def response_format_grammar(given: ResponseFormat | None) -> Grammar | None:
    """What OpenAI's `response_format` asks for."""
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return Grammar("json_object")
    given_schema = given.json_schema or JsonSchemaFormat()
    return schema_grammar(
        given_schema.schema_,
        "response_format.json_schema.schema",
        is_strict=bool(given_schema.strict),
    )


def _grammars(body: SamplingFields) -> list[Grammar | None]:
    structured = body.structured_outputs or StructuredOutputs()
    sources = [
        ("json_schema", structured.json_, "structured_outputs.json"),
        ("regex", structured.regex, "structured_outputs.regex"),
        ("choice", structured.choice, "structured_outputs.choice"),
        ("lark", structured.grammar, "structured_outputs.grammar"),
        ("json_schema", body.guided_json, "guided_json"),
        ("regex", body.guided_regex, "guided_regex"),
        ("choice", body.guided_choice, "guided_choice"),
        ("lark", body.guided_grammar, "guided_grammar"),
    ]
    found: list[Grammar | None] = []
    if structured.json_object:
        found.append(Grammar("json_object"))
    for kind, source, param in sources:
        if source is None:
            continue
        if kind == "json_schema":
            found.append(schema_grammar(source, param))
        elif isinstance(source, list):
            found.append(Grammar.choice(source))
        else:
            found.append(Grammar(kind, str(source)))
    return found


def _logit_bias(given: dict[str, float], info: ModelInfo) -> dict[int, float]:
    try:
        bias = {int(token): value for token, value in given.items()}
    except ValueError:
        raise InvalidRequest("logit_bias: its keys are token ids", param="logit_bias") from None
    _check_vocabulary("logit_bias", list(bias), info)
    return bias


def _check_vocabulary(name: str, ids: list[int], info: ModelInfo) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < info.vocab_size):
        raise InvalidRequest(
            f"{name}: token ids are in [0, {info.vocab_size}), not {min(ids)} .. {max(ids)}",
            param=name,
        )
