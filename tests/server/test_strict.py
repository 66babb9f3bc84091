"""Fields that nobody knows, or nobody can apply, are refused."""

import pytest

from jaxserve.core.errors import InvalidRequest
from jaxserve.server.strict import refuse_fields, reject_unknown_fields
from jaxserve.server.v1 import jaxserve_pb2 as pb

NEWER = b"\xf8\x06\x01"  # field 111, varint 1


def test_unknown_fields_are_refused_at_any_depth() -> None:
    top = pb.GenerateRequest.FromString(pb.GenerateRequest(text="x").SerializeToString() + NEWER)
    with pytest.raises(InvalidRequest, match=r"GenerateRequest .* 111"):
        reject_unknown_fields(top)
    message = pb.ChatMessage.FromString(NEWER)
    nested = pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage(), message]))
    with pytest.raises(InvalidRequest, match=r"ChatMessage .* 111"):
        reject_unknown_fields(nested)
    reject_unknown_fields(pb.GenerateRequest(text="x", sampling_params={"seed": 1}))


def test_maps_are_no_messages() -> None:
    reject_unknown_fields(pb.SamplingParams(logit_bias={1: 2.0, 3: -1.0}))


def test_fields_that_cannot_be_applied_are_refused_by_name() -> None:
    message = pb.TokenizeRequest(text="x", add_special_tokens=False)
    refuse_fields(message, "chat", "model")
    with pytest.raises(InvalidRequest, match="add_special_tokens cannot be applied") as caught:
        refuse_fields(message, "chat", "add_special_tokens")
    assert caught.value.param == "add_special_tokens"
