"""Fields of requests become the engine's parameters, all of them."""

import dataclasses
import json
from typing import Any

import pytest

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.grammar import Grammar
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.server.http import fields
from jaxserve.server.http.chat import ChatRequest
from jaxserve.server.http.completions import CompletionRequest
from jaxserve.server.http.responses import ResponsesRequest
from jaxserve.server.http.unsupported import UNSUPPORTED
from jaxserve.server.limits import RequestLimits
from jaxserve.testing.fake_engine import fake_sync_engine

INFO = fake_sync_engine().info

# Field -> a value, and the engine's field and value.
SAMPLING: dict[str, tuple[Any, str, Any]] = {
    "temperature": (0.5, "temperature", 0.5),
    "top_p": (0.5, "top_p", 0.5),
    "top_k": (5, "top_k", 5),
    "min_p": (0.1, "min_p", 0.1),
    "seed": (-1, "seed", 2**64 - 1),
    "stop": ("x", "stop", ("x",)),
    "stop_token_ids": ([1, 2], "stop_token_ids", (1, 2)),
    "ignore_eos": (True, "ignore_eos", True),
    "min_tokens": (3, "min_tokens", 3),
    "include_stop_str_in_output": (True, "include_stop_str_in_output", True),
    "skip_special_tokens": (False, "skip_special_tokens", False),
    "repetition_penalty": (1.5, "repetition_penalty", 1.5),
    "presence_penalty": (1, "presence_penalty", 1),
    "frequency_penalty": (-1, "frequency_penalty", -1),
    "logit_bias": ({"7": 3, "8": -2.5}, "logit_bias", ((7, 3.0), (8, -2.5))),
    "allowed_token_ids": ([4, 5], "allowed_token_ids", (4, 5)),
    "bad_words": (["a", "b"], "bad_words", ("a", "b")),
    "guided_regex": ("a+", "grammar", Grammar("regex", "a+")),
    "guided_choice": (["a", "b"], "grammar", Grammar.choice(["a", "b"])),
    "guided_grammar": ('start: "a"', "grammar", Grammar("lark", 'start: "a"')),
    "guided_json": ({"type": "null"}, "grammar", Grammar("json_schema", '{"type": "null"}')),
}
# What is set from elsewhere: the maximum differs by API, thinking comes of the model's markers.
OTHERS = {"max_tokens", "logprobs", "prompt_logprobs", "thinking"}


def made(**given: Any) -> SamplingParams:
    body = fields.SamplingFields.model_validate(given)
    return fields.sampling_params(body, INFO, RequestLimits(), max_tokens=None)


def test_the_models_defaults_hold_for_what_a_request_leaves_open() -> None:
    advised = {"temperature": 0.2, "top_p": 0.9, "max_tokens": 30}
    info = fake_sync_engine(default_sampling_params=advised).info

    def sampled(max_tokens: int | None, **given: Any) -> SamplingParams:
        body = fields.SamplingFields.model_validate(given)
        return fields.sampling_params(body, info, RequestLimits(), max_tokens=max_tokens)

    assert sampled(None) == SamplingParams(temperature=0.2, top_p=0.9, max_tokens=30)
    assert sampled(5, temperature=1, top_p=None) == SamplingParams(top_p=0.9, max_tokens=5)


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling(name: str) -> None:
    value, attribute, expected = SAMPLING[name]
    assert getattr(made(**{name: value}), attribute) == expected
    assert made(**{name: None}) == made() == SamplingParams(max_tokens=None)


def test_every_sampling_parameter_can_be_asked_for() -> None:
    reached = {attribute for _, attribute, _ in SAMPLING.values()} | OTHERS
    assert reached == {field.name for field in dataclasses.fields(SamplingParams)}


def test_every_service_parameter_can_be_asked_for() -> None:
    trace = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
    body = fields.ServiceFields(
        tenant="t", priority=3, cache_salt="s", ttft_target_ms=1500, tpot_target_ms=50
    )
    service = fields.service_params(body, trace)
    assert service == ServiceParams(
        tenant="t", priority=3, cache_salt="s", ttft_target=1.5, tpot_target=0.05,
        traceparent=trace,
    )  # fmt: skip
    assert all(getattr(service, field.name) for field in dataclasses.fields(service))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"json": '{"type": "null"}'}, Grammar("json_schema", '{"type": "null"}')),
        ({"json": True}, None),
        ({"json_object": True}, Grammar("json_object")),
        ({"regex": "a"}, Grammar("regex", "a")),
        ({"choice": ["a"]}, Grammar.choice(["a"])),
        ({"grammar": "start: /a/"}, Grammar("lark", "start: /a/")),
    ],
)
def test_structured_outputs(given: dict[str, Any], expected: Grammar | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="json"):
            made(structured_outputs=given)
    else:
        assert made(structured_outputs=given).grammar == expected


@pytest.mark.parametrize(
    "given",
    [
        {"guided_regex": "a", "structured_outputs": {"regex": "a"}},
        {"structured_outputs": {"regex": "a", "json_object": True}},
        {"guided_regex": "a" * 70_000},
        {"guided_json": {"enum": ["a" * 70_000]}},
        {"guided_choice": []},
        {"guided_choice": [""]},
        {"stop": ["a"] * 17},
        {"stop": [""]},
        {"logit_bias": {str(i): 1 for i in range(301)}},
        {"allowed_token_ids": []},
        {"stop_token_ids": [258]},
    ],
)
def test_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        made(**given)


@pytest.mark.parametrize("request_type", [ChatRequest, CompletionRequest, ResponsesRequest])
def test_unsupported_fields_may_ask_for_nothing(request_type: type[fields.Body]) -> None:
    subject: dict[str, Any] = {
        ChatRequest: {"messages": [{"role": "user", "content": "x"}]},
        CompletionRequest: {"prompt": "x"},
        ResponsesRequest: {"input": "x"},
    }[request_type]
    plain = request_type.model_validate(subject)
    for name in UNSUPPORTED.keys() - request_type.model_fields.keys():
        for value in (None, *UNSUPPORTED[name]):
            assert request_type.model_validate({**subject, name: value}) == plain
        with pytest.raises(ValueError, match="extra_forbidden"):
            request_type.model_validate({**subject, name: {"something": 1}})
    assert json.dumps(request_type.model_json_schema())
