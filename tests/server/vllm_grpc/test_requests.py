"""vLLM's Generate requests: every field is applied, or refused by its name."""

import asyncio
from typing import Any

import pytest
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.grammar import Grammar
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.server.limits import RequestLimits
from jaxserve.server.vllm_grpc.requests import Generation, read_generate
from jaxserve.testing.fake_engine import fake_sync_engine
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

LIMITS = RequestLimits(max_n=4, max_grammar_chars=100)
INFO = fake_sync_engine(max_model_len=16).info


def read(params: dict[str, Any] | None = None, **fields: Any) -> Generation:
    if "text" not in fields:
        fields = {"tokenized": pb.TokenizedInput(input_ids=[1, 2, 3]), **fields}
    request = pb.GenerateRequest(sampling_params=pb.SamplingParams(**params or {}), **fields)
    return asyncio.run(read_generate(request, ByteTokenizer(), INFO, LIMITS))


def test_unset_fields_mean_what_they_mean_to_vllm() -> None:
    params = SamplingParams(max_tokens=None, skip_special_tokens=False)
    assert read() == Generation([1, 2, 3], params, 1)


def test_the_models_defaults_hold_where_a_field_can_be_unset() -> None:
    """0 keeps all tokens by top_k and min_p: these two say something always."""
    advised = {"temperature": 0.5, "top_p": 0.75, "top_k": 9, "repetition_penalty": 1.5}
    info = fake_sync_engine(max_model_len=16, default_sampling_params=advised).info
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"temperature": 0.5, "top_p": 0.75, "repetition_penalty": 1.5}),
        ({"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}, {}),
    ]
    for given, expected in cases:
        request = pb.GenerateRequest(
            sampling_params=pb.SamplingParams(**given),
            tokenized=pb.TokenizedInput(input_ids=[1]),
        )
        made = asyncio.run(read_generate(request, ByteTokenizer(), info, LIMITS))
        assert made.params == SamplingParams(max_tokens=None, skip_special_tokens=False, **expected)


# What jaxserve's parameter becomes of the field's value, where it is not the same.
APPLIED: dict[str, tuple[Any, dict[str, Any]]] = {
    "temperature": (0.5, {"temperature": 0.5}),
    "top_p": (0.5, {"top_p": 0.5}),
    "top_k": (4, {"top_k": 4}),
    "min_p": (0.25, {"min_p": 0.25}),
    "frequency_penalty": (0.5, {"frequency_penalty": 0.5}),
    "presence_penalty": (-0.5, {"presence_penalty": -0.5}),
    "repetition_penalty": (1.5, {"repetition_penalty": 1.5}),
    "max_tokens": (9, {"max_tokens": 9}),
    "min_tokens": (2, {"min_tokens": 2}),
    "stop": (["a", "b"], {"stop": ("a", "b")}),
    "stop_token_ids": ([3], {"stop_token_ids": (3,)}),
    "skip_special_tokens": (True, {"skip_special_tokens": True}),
    "spaces_between_special_tokens": (True, {}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "n": (3, {}),
    "logprobs": (0, {"logprobs": 0}),
    "prompt_logprobs": (2, {"prompt_logprobs": 2}),
    "seed": (-1, {"seed": 2**64 - 1}),
    "include_stop_str_in_output": (True, {"include_stop_str_in_output": True}),
    "logit_bias": ({7: 1.5}, {"logit_bias": {7: 1.5}}),
    "truncate_prompt_tokens": (2, {}),
    "grammar_from_first_token": (True, {}),
    "json_schema": ("{}", {"grammar": Grammar("json_schema", "{}")}),
    "regex": ("a+", {"grammar": Grammar("regex", "a+")}),
    "grammar": ('start: "a"', {"grammar": Grammar("lark", 'start: "a"')}),
    "json_object": (True, {"grammar": Grammar("json_object")}),
    "choice": (pb.ChoiceConstraint(choices=["a"]), {"grammar": Grammar.choice(["a"])}),
}


def test_every_field_of_the_protocol_is_known_here() -> None:
    names = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    assert names == {*APPLIED, "structural_tag"}


@pytest.mark.parametrize("name", APPLIED)
def test_a_field_is_applied(name: str) -> None:
    value, ours = APPLIED[name]
    got = read({name: value})
    assert got.params == SamplingParams(
        **{"max_tokens": None, "skip_special_tokens": False, **ours}
    )
    assert got.n == (3 if name == "n" else 1)
    assert got.prompt == ([2, 3] if name == "truncate_prompt_tokens" else [1, 2, 3])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kv_transfer_params": pb.KvTransferParams()}, "kv_transfer_params"),
        ({"kv_transfer_params_json": "{}"}, "kv_transfer_params_json"),
        ({"mm_inputs": pb.MultimodalInputs()}, "mm_inputs"),
        ({"extra_mm_inputs": [pb.MultimodalInputs()]}, "extra_mm_inputs"),
        ({"media_refs": pb.MediaRefs()}, "media_refs"),
        ({"data_parallel_rank": 1}, "data_parallel_rank"),
        ({"params": {"structural_tag": "{}"}}, "structural_tag"),
        ({"params": {"logprobs": -1}}, "logprobs"),
        ({"params": {"prompt_logprobs": 21}}, "prompt_logprobs"),
        ({"params": {"n": 5}}, "n"),
        ({"params": {"logit_bias": {-1: 1}}}, "logit_bias"),
        ({"params": {"stop_token_ids": [258]}}, "stop_token_ids"),
        ({"params": {"json_object": False}}, "json_object"),
        ({"params": {"choice": pb.ChoiceConstraint()}}, "choice"),
        ({"params": {"regex": "a" * 101}}, "regex"),
        ({"params": {"truncate_prompt_tokens": 0}}, "truncate_prompt_tokens"),
        ({"params": {"truncate_prompt_tokens": -2}}, "truncate_prompt_tokens"),
        ({"params": {"max_tokens": 0}}, "max_tokens"),
        ({"text": ""}, "empty"),
        ({"tokenized": pb.TokenizedInput()}, "empty"),
        ({"tokenized": pb.TokenizedInput(input_ids=[1] * 17)}, "17 tokens"),
    ],
)
def test_what_cannot_be_applied_is_refused_by_name(fields: dict, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        read(**fields)


def test_a_request_without_input() -> None:
    with pytest.raises(InvalidRequest, match="no input"):
        asyncio.run(read_generate(pb.GenerateRequest(), ByteTokenizer(), INFO, LIMITS))


@pytest.mark.parametrize(("wanted", "kept"), [(-1, 15), (3, 3), (16, 16)])
def test_truncation_keeps_the_prompt_s_end(wanted: int, kept: int) -> None:
    ids = list(range(100))
    for fields in ({"tokenized": pb.TokenizedInput(input_ids=ids)}, {"text": bytes(ids).decode()}):
        assert read({"truncate_prompt_tokens": wanted}, **fields).prompt == ids[-kept:]
    with pytest.raises(InvalidRequest, match="17 tokens"):
        read({"truncate_prompt_tokens": 20}, tokenized=pb.TokenizedInput(input_ids=ids))


def test_a_grammar_is_passed_on() -> None:
    for source in ('root ::= "a" [0-9]+', 'start: "a"'):
        assert read({"grammar": source}).params.grammar == Grammar("lark", source)
