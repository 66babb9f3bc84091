"""Parameters by map and by JSON: applied, or refused by name."""

import dataclasses
from typing import Any

import pytest

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.grammar import Grammar
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.server.kserve import open_inference_pb2 as pb
from jaxserve.server.kserve.parameters import Parameters, read_json, read_parameters
from jaxserve.server.limits import RequestLimits

LIMITS = RequestLimits(max_grammar_chars=100, max_prompt_chars=10_000)
DEFAULTS: dict[str, float | int] = {}
KINDS = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}


def read(more: dict[str, Any] | None = None, **parameters: Any) -> Parameters:
    message = {
        name: pb.InferParameter(**{KINDS[type(value)]: value}) for name, value in parameters.items()
    }
    return read_parameters(
        message, more or {}, vocab_size=258, limits=LIMITS, defaults=DEFAULTS, traceparent="t"
    )


def test_the_models_defaults_hold_for_what_is_not_given(monkeypatch) -> None:
    monkeypatch.setitem(DEFAULTS, "temperature", 0.2)
    monkeypatch.setitem(DEFAULTS, "max_tokens", 9)
    assert read().sampling == SamplingParams(temperature=0.2, max_tokens=9)
    assert read(temperature=1.0, max_tokens=5).sampling == SamplingParams(max_tokens=5)


def test_nothing_given() -> None:
    assert read() == Parameters(SamplingParams(max_tokens=256), ServiceParams(traceparent="t"))


def test_scalars_by_parameter() -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5, "top_k": 5, "top_p": 1, "min_p": 0.25, "seed": 7, "max_tokens": 9,
        "stop": "###", "ignore_eos": True, "min_tokens": 2, "include_stop_str_in_output": True,
        "skip_special_tokens": False, "repetition_penalty": 1.5, "presence_penalty": 1,
        "frequency_penalty": -1.0,
    }  # fmt: skip
    assert read(**fields).sampling == SamplingParams(**fields)
    told = read(tenant="a", priority=-3, cache_salt="s").service
    assert told == ServiceParams(tenant="a", priority=-3, cache_salt="s", traceparent="t")


def test_lists_by_json() -> None:
    given = {
        "stop": ["a", "b"], "stop_token_ids": [1, 2.0], "logit_bias": {"3": 1.5},
        "allowed_token_ids": ["3", 4], "bad_words": ["c"], "temperature": "0.25", "top_k": "4",
        "ignore_eos": "true",
    }  # fmt: skip
    assert read(given, max_tokens=5).sampling == SamplingParams(
        stop=("a", "b"), stop_token_ids=(1, 2), logit_bias={3: 1.5}, allowed_token_ids=(3, 4),
        bad_words=("c",), temperature=0.25, top_k=4, ignore_eos=True, max_tokens=5,
    )  # fmt: skip


def test_every_sampling_field_is_known_or_refused() -> None:
    refused = set()
    for field in dataclasses.fields(SamplingParams):
        try:
            read({field.name: None})
        except InvalidRequest as error:
            if "cannot be applied" in str(error):
                refused.add(field.name)
    assert refused == {"logprobs", "prompt_logprobs", "grammar", "thinking"}


@pytest.mark.parametrize(
    ("more", "grammar"),
    [
        ({"json_object": True}, Grammar("json_object")),
        ({"json_schema": {"type": "null"}}, Grammar("json_schema", '{"type": "null"}')),
        ({"json_schema": "{}"}, Grammar("json_schema", "{}")),
        ({"regex": "a+"}, Grammar("regex", "a+")),
        ({"lark": 'start: "a"'}, Grammar("lark", 'start: "a"')),
        ({"choice": ["a", "b"]}, Grammar.choice(["a", "b"])),
    ],
)
def test_grammars(more: dict, grammar: Grammar) -> None:
    assert read(more).sampling.grammar == grammar


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"n": 2}, "n"), ({"best_of": 2}, "best_of"), ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"), ({"temperature": None}, "temperature"),
        ({"temperature": float("nan")}, "temperature"), ({"temperature": 10**400}, "temperature"),
        ({"top_k": 1.5}, "top_k"), ({"top_k": float("inf")}, "top_k"),
        ({"top_k": "9" * 5000}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": []}, "max_tokens"),
        ({"ignore_eos": 1}, "ignore_eos"), ({"stop": [1]}, "stop"), ({"stop": [""]}, "stop"),
        ({"stop_token_ids": 3}, "stop_token_ids"), ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [10**30]}, "stop_token_ids"), ({"logit_bias": []}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"258": 1}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"), ({"bad_words": [None]}, "bad_words"),
        ({"tenant": 3}, "tenant"), ({"priority": 2**31}, "priority"), ({"seed": -1}, "seed"),
        ({"regex": "a", "lark": "b"}, "regex"), ({"json_object": False}, "json_object"),
        ({"regex": "a" * 101}, "regex"), ({"regex": 1}, "regex"), ({"choice": [1]}, "choice"),
        ({"json_schema": {"const": "x" * 100}}, "json_schema"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(more: dict, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        read(more)


def test_a_parameter_is_given_once_and_has_a_value() -> None:
    with pytest.raises(InvalidRequest, match=r"top_k.* twice"):
        read({"top_k": 1}, top_k=2)
    with pytest.raises(InvalidRequest, match=r"top_k.* no value"):
        read_parameters(
            {"top_k": pb.InferParameter()}, {}, vocab_size=9, limits=LIMITS, defaults={}
        )


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"3", b"\xff", b"[" * 9000, b'{"a": ' + b"1" * 5000 + b"}", b" " * 10_001],
)
def test_json_that_is_none(text: bytes) -> None:
    with pytest.raises(InvalidRequest, match="sampling_parameters"):
        read_json(text, LIMITS)
