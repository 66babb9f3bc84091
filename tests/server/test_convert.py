"""Messages to engine types and back, strictly."""

import asyncio
import dataclasses
import threading

import pytest

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.request import FinishReason
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.outputs import EngineLoad, ModelInfo, TokenDelta
from jaxserve.server import convert, prompts
from jaxserve.server.limits import RequestLimits
from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.testing.byte_tokenizer import ByteTokenizer


def params(**fields: object) -> SamplingParams:
    return convert.sampling_params(pb.SamplingParams(**fields), vocab_size=258)  # type: ignore


def prompt(request: pb.GenerateRequest | pb.TokenizeRequest) -> list[int]:
    return asyncio.run(convert.prompt_token_ids(request, ByteTokenizer(), 512, RequestLimits()))


def test_unset_sampling_fields_take_the_documented_defaults() -> None:
    assert params() == SamplingParams(max_tokens=256)


def test_the_proto_has_every_sampling_field() -> None:
    names = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    assert names == {field.name for field in dataclasses.fields(SamplingParams)}


def test_every_sampling_field_arrives() -> None:
    fields = {
        "temperature": 0.0, "top_k": 5, "top_p": 0.1, "min_p": 0.25, "seed": 2**64 - 1,
        "max_tokens": 7, "stop": ("a", "b"), "stop_token_ids": (3, 4), "ignore_eos": True,
    }  # fmt: skip
    assert params(**fields) == SamplingParams(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"top_k": -2}, {"top_p": 0},
        {"top_p": 1.1}, {"min_p": -0.1}, {"max_tokens": 0}, {"max_tokens": -5}, {"stop": [""]},
        {"stop": ["x"] * 17}, {"stop_token_ids": [258]}, {"stop_token_ids": [2**32 - 1]},
    ],
)  # fmt: skip
def test_sampling_values_out_of_range_are_refused(fields: dict) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(fields)).split("_")[0]):
        params(**fields)


def test_the_three_kinds_of_prompt() -> None:
    tokenizer = ByteTokenizer()
    assert prompt(pb.GenerateRequest(text="hé")) == tokenizer.encode("hé")
    assert prompt(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]))) == [5, 6]
    messages = [{"role": "user", "content": "hi"}]
    chat = pb.ChatMessages(messages=[pb.ChatMessage(**messages[0])])
    assert prompt(pb.GenerateRequest(chat=chat)) == tokenizer.apply_chat_template(messages)
    chat.add_generation_prompt = False
    plain = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    assert prompt(pb.GenerateRequest(chat=chat)) == plain


def test_tokenize_may_leave_out_special_tokens() -> None:
    request = pb.TokenizeRequest(text="hi", add_special_tokens=False)
    assert prompt(request) == ByteTokenizer().encode("hi", add_special_tokens=False)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (pb.GenerateRequest(), "no prompt"),
        (pb.GenerateRequest(text=""), "empty"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "empty"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 513)), "513 tokens"),
        (pb.GenerateRequest(chat=pb.ChatMessages()), "no messages"),
        (
            pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage(content="x")])),
            "role",
        ),
        (
            pb.TokenizeRequest(
                chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user")]),
                add_special_tokens=True,
            ),
            "does not apply",
        ),
    ],
)
def test_prompts_that_cannot_be_served(
    request_: pb.GenerateRequest | pb.TokenizeRequest, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says):
        prompt(request_)


def test_long_texts_are_encoded_off_the_event_loop() -> None:
    threads = []

    class Spy(ByteTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            threads.append(threading.current_thread())
            return super().encode(text, add_special_tokens=add_special_tokens)

    for length in (prompts.MAX_INLINE_CHARS, prompts.MAX_INLINE_CHARS + 1):
        request = pb.GenerateRequest(text="x" * length)
        asyncio.run(convert.prompt_token_ids(request, Spy(), 512, RequestLimits()))
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()


def test_unknown_fields_are_refused_at_any_depth() -> None:
    newer = b"\xf8\x06\x01"  # field 111, varint 1
    top = pb.GenerateRequest.FromString(pb.GenerateRequest(text="x").SerializeToString() + newer)
    with pytest.raises(InvalidRequest, match=r"GenerateRequest .* 111"):
        convert.reject_unknown_fields(top)
    message = pb.ChatMessage.FromString(newer)
    nested = pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage(), message]))
    with pytest.raises(InvalidRequest, match=r"ChatMessage .* 111"):
        convert.reject_unknown_fields(nested)
    convert.reject_unknown_fields(pb.GenerateRequest(text="x", sampling_params={"seed": 1}))


def test_request_ids() -> None:
    assert convert.request_id("") is None
    assert convert.request_id("a" * 256) == "a" * 256
    with pytest.raises(InvalidRequest, match="257"):
        convert.request_id("a" * 257)


# A request that is shed ends with a status.
@pytest.mark.parametrize("reason", sorted(set(FinishReason) - {FinishReason.SHED}))
def test_the_last_message_has_reason_and_usage(reason: FinishReason) -> None:
    delta = TokenDelta("id", "text", (1, 2), reason, 3, 2, 1)
    response = convert.generate_response(delta)
    assert pb.FinishReason.Name(response.finish_reason) == f"FINISH_REASON_{reason.name}"
    assert response.usage == pb.Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
    before = convert.generate_response(dataclasses.replace(delta, finish_reason=None))
    assert before == pb.GenerateResponse(request_id="id", text="text", token_ids=[1, 2])


@pytest.mark.parametrize(
    ("message", "dataclass"),
    [(pb.GetModelInfoResponse, ModelInfo), (pb.GetLoadResponse, EngineLoad)],
)
def test_info_and_load_messages_mirror_the_dataclasses(message: type, dataclass: type) -> None:
    names = {field.name for field in message.DESCRIPTOR.fields}  # type: ignore[attr-defined]
    assert names == {field.name for field in dataclasses.fields(dataclass)}


def test_load_values_arrive() -> None:
    names = [field.name for field in dataclasses.fields(EngineLoad)]
    load = EngineLoad(**{name: i for i, name in enumerate(names)})
    assert [getattr(convert.load(load), name) for name in names] == list(range(len(names)))
