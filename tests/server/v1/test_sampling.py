"""The protocol's sampling parameters as the engine's, strictly."""

import dataclasses
from typing import Any

import pytest

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.grammar import Grammar
from jaxserve.core.sampling_params import SamplingParams, ThinkingBudget
from jaxserve.server.limits import RequestLimits
from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.server.v1.responses import model_info
from jaxserve.server.v1.sampling import sampling_params
from jaxserve.testing.fake_engine import fake_sync_engine
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

DEFAULTS: dict[str, float | int] = {}


def params(prompt: str = "", **fields: Any) -> SamplingParams:
    tokenizer = ByteTokenizer()
    return sampling_params(
        pb.SamplingParams(**fields),
        prompt=tokenizer.encode(prompt),
        tokenizer=tokenizer,
        vocab_size=258,
        limits=RequestLimits(max_grammar_chars=100),
        defaults=DEFAULTS,
    )


def test_unset_sampling_fields_take_the_documented_defaults() -> None:
    assert params() == SamplingParams(max_tokens=256)


def test_the_models_defaults_hold_for_unset_fields(monkeypatch) -> None:
    monkeypatch.setitem(DEFAULTS, "top_k", 64)
    monkeypatch.setitem(DEFAULTS, "max_tokens", 9)
    assert params() == SamplingParams(top_k=64, max_tokens=9)
    assert params(top_k=0, max_tokens=5) == SamplingParams(max_tokens=5)


def test_model_info_shows_the_models_defaults() -> None:
    info = fake_sync_engine(default_sampling_params={"temperature": 0.25, "top_k": 3}).info
    expected = pb.SamplingParams(temperature=0.25, top_k=3)
    assert model_info(info).default_sampling_params == expected
    assert not model_info(fake_sync_engine().info).default_sampling_params.ListFields()


def test_the_proto_has_every_sampling_field() -> None:
    names = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    assert names == {field.name for field in dataclasses.fields(SamplingParams)}


def test_every_plain_sampling_field_arrives() -> None:
    fields: dict[str, Any] = {
        "temperature": 0.0, "top_k": 5, "top_p": 0.1, "min_p": 0.25, "seed": 2**64 - 1,
        "max_tokens": 7, "stop": ("a", "b"), "stop_token_ids": (3, 4), "ignore_eos": True,
        "repetition_penalty": 1.5, "presence_penalty": -0.5, "frequency_penalty": 0.25,
        "logit_bias": {7: 1.5, 257: -100.0}, "bad_words": ("x", "y"), "min_tokens": 3,
        "include_stop_str_in_output": True, "skip_special_tokens": False, "logprobs": 0,
        "prompt_logprobs": 20,
    }  # fmt: skip
    assert set(fields) | {"allowed_token_ids", "grammar", "thinking"} == {
        field.name for field in dataclasses.fields(SamplingParams)
    }
    expected = SamplingParams(**fields)
    got = params(**fields)
    assert sorted(got.biases) == sorted(expected.biases)
    assert dataclasses.replace(got, logit_bias=()) == dataclasses.replace(expected, logit_bias=())


def test_allowed_token_ids_tell_none_from_unset() -> None:
    assert params().allowed_token_ids is None
    assert params(allowed_token_ids=pb.TokenIds(ids=[1, 2])).allowed_token_ids == (1, 2)
    with pytest.raises(InvalidRequest, match="allowed_token_ids is empty"):
        params(allowed_token_ids=pb.TokenIds())


@pytest.mark.parametrize(
    ("message", "grammar"),
    [
        (pb.Grammar(json_object=True), Grammar("json_object")),
        (pb.Grammar(json_schema='{"type": "null"}'), Grammar("json_schema", '{"type": "null"}')),
        (pb.Grammar(regex="a+"), Grammar("regex", "a+")),
        (pb.Grammar(lark='start: "a"'), Grammar("lark", 'start: "a"')),
        (pb.Grammar(choice=pb.Choice(options=["a", "b"])), Grammar.choice(["a", "b"])),
    ],
)  # fmt: skip
def test_grammars(message: pb.Grammar, grammar: Grammar) -> None:
    assert params(grammar=message).grammar == grammar


@pytest.mark.parametrize(
    "message",
    [pb.Grammar(), pb.Grammar(json_object=False), pb.Grammar(regex=""), pb.Grammar(lark=""),
     pb.Grammar(choice=pb.Choice()), pb.Grammar(choice=pb.Choice(options=["a", ""])),
     pb.Grammar(regex="a" * 101), pb.Grammar(choice=pb.Choice(options=["a" * 60, "b" * 60]))],
)  # fmt: skip
def test_grammars_that_make_no_sense_are_refused(message: pb.Grammar) -> None:
    with pytest.raises(InvalidRequest, match=r"grammar|json_object|choice"):
        params(grammar=message)


THINK: dict[str, Any] = {
    "start": pb.Marker(text="<t>"),
    "end": pb.Marker(token_ids=pb.TokenIds(ids=[1, 2])),
}


@pytest.mark.parametrize(
    ("prompt", "inside"),
    [("hi", False), ("hi <t>", True), ("hi <t>\n\n", True), ("hi <t> well", False), ("", False),
     ("<t></t>", False), ("<t>" + " " * 20, False)],
)  # fmt: skip
def test_thinking_may_have_begun_in_the_prompt(prompt: str, inside: bool) -> None:
    got = params(prompt, thinking=pb.ThinkingBudget(max_tokens=9, **THINK)).thinking
    assert got == ThinkingBudget(9, tuple(b"<t>"), (1, 2), inside)
    told = params(prompt, thinking=pb.ThinkingBudget(max_tokens=9, begins_inside=True, **THINK))
    assert told.thinking and told.thinking.begins_inside


@pytest.mark.parametrize(
    "fields",
    [{}, {"start": THINK["start"]}, {**THINK, "max_tokens": -1}, {**THINK, "end": pb.Marker()},
     {**THINK, "start": pb.Marker(text="")}, {**THINK, "start": pb.Marker(text="x" * 257)},
     {**THINK, "end": pb.Marker(token_ids=pb.TokenIds(ids=[258]))}],
)  # fmt: skip
def test_thinking_without_markers_is_refused(fields: dict) -> None:
    with pytest.raises(InvalidRequest, match="thinking"):
        params(thinking=pb.ThinkingBudget(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"top_k": -2}, {"top_p": -0.1},
        {"top_p": 1.1}, {"min_p": -0.1}, {"max_tokens": 0}, {"max_tokens": -5}, {"stop": [""]},
        {"stop": ["x"] * 17}, {"stop": ["x" * 4097]}, {"bad_words": ["x" * 4097]},
        {"stop_token_ids": [1] * 259},
        {"stop_token_ids": [258]}, {"stop_token_ids": [2**32 - 1]},
        {"logit_bias": {258: 1}}, {"logit_bias": {1: 101}}, {"bad_words": [""]},
        {"allowed_token_ids": pb.TokenIds(ids=[1, 258])}, {"repetition_penalty": 0},
        {"presence_penalty": 3}, {"frequency_penalty": float("inf")}, {"min_tokens": -1},
        {"min_tokens": 300}, {"logprobs": -1}, {"logprobs": 21}, {"prompt_logprobs": 21},
    ],
)  # fmt: skip
def test_sampling_values_out_of_range_are_refused(fields: dict) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(fields)).split("_")[0]):
        params(**fields)
