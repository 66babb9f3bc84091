"""Anything at all as a message of any method: refused or served, never a bug, nothing leaked.

A longer run: `pytest tests/server/test_fuzz_grpc.py --hypothesis-profile=fuzz`.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.server import SERVICERS
from jaxserve.testing.fake_engine import fake_engine
from tests.server.in_a_thread import in_a_thread

METHODS = {m.full_name: m for service in SERVICERS for m in service.methods}
NUM_EXAMPLES = settings().max_examples if settings.get_current_profile_name() == "fuzz" else 40
C = grpc.StatusCode
GOOD_CODES = {
    C.OK, C.INVALID_ARGUMENT, C.NOT_FOUND, C.RESOURCE_EXHAUSTED,
    C.FAILED_PRECONDITION,  # a grammar that this model's tokens cannot follow to its end
}  # fmt: skip
NOT_OFFERED = {"FlushCache", "StartProfile", "StopProfile"}

# By field: values that get a message further than chance would.
WORDS: dict[str, list[Any]] = {
    "model": ["", "fake"], "model_name": ["", "fake"], "version": ["", "1"],
    "model_version": ["", "1"], "role": ["user", "assistant"], "datatype": ["BYTES", "BOOL"],
    "name": ["fake", "text_input", "stream", "sampling_parameters", "text_output"],
    "key": ["max_tokens", "temperature", "stop", "regex", "seed", "top_k", "n"],
    "regex": ["[ab]+", "(", "a{1000000}", "(a|b)*c"], "json_schema": ["{}", '{"type": "object"}',
    '{"$ref": "#"}', "["], "lark": ['start: "a"', "start: start", "%"],
    "grammar": ['start: "a"+', 'root ::= "a" | root', "root ::= ("],
    "request_id": ["", "same"], "request_ids": ["same", "same-0"], "stop": ["a", "ab", "\n"],
    "shape": [1, 2, -1], "bytes_contents": [b"hi", b'{"max_tokens": 3}', b"\xff"],
    "raw_input_contents": [b"\x02\0\0\0hi", b"\1", b"\xff\xff\xff\xff"],
    "input_ids": [1, 2, 257, 258], "ids": [1, 2, 257, 258],
}  # fmt: skip
# By message: one that is served, from which others are but a few steps away.
SERVED: dict[str, dict[str, Any]] = {
    "jaxserve.v1.GenerateRequest": {"text": "hi", "samplingParams": {"maxTokens": 4}},
    "jaxserve.v1.EmbedRequest": {"text": "hi"},
    "jaxserve.v1.TokenizeRequest": {"chat": {"messages": [{"role": "user", "content": "hi"}]}},
    "inference.ModelInferRequest": {
        "modelName": "fake",
        "parameters": {"max_tokens": {"int64Param": 4}},
        "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1],
                    "contents": {"bytesContents": ["aGk="]}}],
    },
    "vllm.grpc.engine.GenerateRequest": {
        "tokenized": {"inputIds": [1, 2]}, "samplingParams": {"maxTokens": 4},
    },
    "vllm.grpc.engine.EmbedRequest": {"tokenized": {"inputIds": [1, 2]}},
}  # fmt: skip
INTEGERS = [0, 1, 2, 3, 16, 17, 63, 64, 258, 2**31 - 1]
FLOATS = [0.0, 0.5, 1.0, -1.0, 2.0, 1e30, math.inf, math.nan]
F = FieldDescriptor


def scalars(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Values of a field that is no message."""
    kind = field.cpp_type
    by_chance: st.SearchStrategy[Any]
    if kind in (F.CPPTYPE_INT32, F.CPPTYPE_INT64):
        bits = 31 if kind == F.CPPTYPE_INT32 else 63
        by_chance = st.sampled_from([*INTEGERS, -1]) | st.integers(-(2**bits), 2**bits - 1)
    elif kind in (F.CPPTYPE_UINT32, F.CPPTYPE_UINT64):
        bits = 32 if kind == F.CPPTYPE_UINT32 else 64
        by_chance = st.sampled_from(INTEGERS) | st.integers(0, 2**bits - 1)
    elif kind in (F.CPPTYPE_FLOAT, F.CPPTYPE_DOUBLE):
        by_chance = st.sampled_from(FLOATS)
    elif kind == F.CPPTYPE_BOOL:
        by_chance = st.booleans()
    elif kind == F.CPPTYPE_ENUM:
        by_chance = st.integers(-1, 5)
    elif field.type == F.TYPE_BYTES:
        by_chance = st.binary(max_size=20)
    else:
        by_chance = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    words = WORDS.get(field.name)
    if field.name == "key" and kind != F.CPPTYPE_STRING:
        words = None
    elif field.name == "shape" and kind == F.CPPTYPE_UINT32:
        words = [1, 2]
    return st.one_of(*[st.sampled_from(words)] * 3, by_chance) if words else by_chance


@st.composite
def messages(draw: st.DrawFn, kind: Descriptor, depth: int = 4) -> Message:
    """Messages of any content, of which about half of the fields are set."""
    message = GetMessageClass(kind)()
    for oneof in kind.oneofs:
        field = draw(st.sampled_from([None, *oneof.fields]))
        if field is not None:
            fill(draw, message, field, depth)
    for field in fields_of(kind):
        if field.containing_oneof is None and draw(st.booleans()):
            fill(draw, message, field, depth)
    return message


def fill(draw: st.DrawFn, message: Message, field: FieldDescriptor, depth: int) -> None:
    kind = field.message_type
    if kind is None:
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(scalars(field), max_size=3)))
        else:
            setattr(message, field.name, draw(scalars(field)))
    elif depth and kind.GetOptions().map_entry:
        target = getattr(message, field.name)
        for key in draw(st.lists(scalars(kind.fields_by_name["key"]), max_size=2)):
            value = kind.fields_by_name["value"]
            if value.message_type is None:
                target[key] = draw(scalars(value))
            else:
                target[key].CopyFrom(draw(messages(value.message_type, depth - 1)))
    elif depth and field.is_repeated:
        items = draw(st.lists(messages(kind, depth - 1), max_size=2))
        getattr(message, field.name).extend(items)
    elif depth:
        getattr(message, field.name).CopyFrom(draw(messages(kind, depth - 1)))


@st.composite
def near_served(draw: st.DrawFn, kind: Descriptor) -> Message:
    """A message that would be served, with a few fields set to anything."""
    message = json_format.ParseDict(SERVED.get(kind.full_name, {}), GetMessageClass(kind)())
    places = list(nodes(message))
    for _ in range(draw(st.integers(0, 3)) if kind.fields else 0):
        place = draw(st.sampled_from(places))
        fill(draw, place, draw(st.sampled_from(fields_of(place.DESCRIPTOR))), 2)
    return message


def nodes(message: Message) -> Iterator[Message]:
    """A message and all those in it that have fields."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is None or not field.message_type.fields:
            continue
        if field.message_type.GetOptions().map_entry:
            children = list(value.values())
        else:
            children = list(value) if field.is_repeated else [value]
        for child in children:
            if isinstance(child, Message):
                yield from nodes(child)


def fields_of(kind: Any) -> list[FieldDescriptor]:
    return list(kind.fields)


@st.composite
def wire_bytes(draw: st.DrawFn, method: MethodDescriptor) -> bytes:
    """A message's bytes, mostly whole; or damaged; or none of a message."""
    any_message = near_served(method.input_type) | messages(method.input_type)
    data = draw(any_message).SerializeToString()
    damage = draw(st.sampled_from([*[""] * 8, "cut", "flip", "more", "other"]))
    place = draw(st.integers(0, len(data)))
    if damage == "cut":
        return data[:place]
    if damage == "flip" and place < len(data):
        return data[:place] + bytes([data[place] ^ draw(st.integers(1, 255))]) + data[place + 1 :]
    if damage == "more":
        return data + draw(st.binary(max_size=20))
    if damage == "other":
        return draw(st.binary(max_size=200))
    return data


class Target(NamedTuple):
    """A server in a thread, and a plain client of it."""

    engine: AsyncEngine
    channel: grpc.Channel


@pytest.fixture(scope="module")
def target(serving: Callable[..., AbstractAsyncContextManager[Any]]) -> Iterator[Target]:
    engine = fake_engine(max_model_len=64, num_pages=256, step_seconds=0)
    with in_a_thread(serving(engine)) as s, grpc.insecure_channel(s.server.address) as channel:
        yield Target(engine, channel)
    engine.shutdown()


def call(target: Target, method: MethodDescriptor, data: bytes) -> tuple[grpc.StatusCode, str]:
    """Status and details of a call with these bytes."""
    kind = "stream" if method.client_streaming else "unary"
    kind += "_stream" if method.server_streaming else "_unary"
    assert method.containing_service is not None
    path = f"/{method.containing_service.full_name}/{method.name}"
    endless = method.name == "SubscribeKvEvents"
    function = getattr(target.channel, kind)(path)
    try:
        answer = function(
            iter([data, data]) if method.client_streaming else data, timeout=0.02 if endless else 30
        )
        if method.server_streaming:
            for message in answer:
                if method.client_streaming:
                    response = GetMessageClass(method.output_type).FromString(message)
                    error = response.error_message  # pyright: ignore[reportAttributeAccessIssue]
                    assert not error.startswith(("INTERNAL", "UNKNOWN")), error
    except grpc.RpcError as error:
        code, details = error.code(), error.details()  # type: ignore[attr-defined]
        return (C.OK if endless and code is C.DEADLINE_EXCEEDED else code), details or ""
    return C.OK, ""


def wait_idle(engine: AsyncEngine) -> None:
    deadline = time.monotonic() + 10
    while (load := engine.load()).num_running + load.num_waiting + load.num_used_pages:
        assert time.monotonic() < deadline, f"something is left: {load}"
        time.sleep(0.001)


@pytest.mark.parametrize("name", METHODS)
@settings(
    max_examples=NUM_EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_anything_is_served_or_refused(target: Target, name: str, data: st.DataObject) -> None:
    method = METHODS[name]
    code, details = call(target, method, data.draw(wire_bytes(method)))
    allowed = {*GOOD_CODES, C.UNIMPLEMENTED} if method.name in NOT_OFFERED else GOOD_CODES
    assert code in allowed, f"{code}: {details}"
    assert target.engine.is_ready
    wait_idle(target.engine)
