"""The engine's words as messages."""

import dataclasses

import pytest

from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.request import FinishReason
from jaxserve.engine.outputs import EngineLoad, ModelInfo, TokenDelta
from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.server.v1 import responses

DELTA = TokenDelta("id-3", "text", (1, 2), FinishReason.STOP, 3, 2, 1)


# A request that is shed or fails ends with a status.
STATUS = {FinishReason.SHED, FinishReason.ERROR}


@pytest.mark.parametrize("reason", sorted(set(FinishReason) - STATUS))
def test_the_last_message_has_reason_and_usage(reason: FinishReason) -> None:
    delta = dataclasses.replace(DELTA, finish_reason=reason)
    response = responses.generate_response(delta, "id", 3)
    assert pb.FinishReason.Name(response.finish_reason) == f"FINISH_REASON_{reason.name}"
    assert response.usage == pb.Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
    before = responses.generate_response(dataclasses.replace(delta, finish_reason=None), "id", 3)
    assert before == pb.GenerateResponse(request_id="id", text="text", token_ids=[1, 2], index=3)


def test_logprobs() -> None:
    places = tuple(TokenLogprobs(i, -0.5 * i, i, (7, 8), (-0.25, -4.0)) for i in (1, 2))
    delta = dataclasses.replace(DELTA, logprobs=places, prompt_logprobs=places[:1])
    response = responses.generate_response(delta, "id")
    assert [(p.token_id, p.logprob, p.rank) for p in response.logprobs] == [
        (1, -0.5, 1),
        (2, -1.0, 2),
    ]
    [first] = response.prompt_logprobs
    assert (list(first.top_ids), list(first.top_logprobs)) == ([7, 8], [-0.25, -4.0])
    assert not responses.generate_response(delta, "id", 1).prompt_logprobs


@pytest.mark.parametrize(
    ("reason", "field"), [("###", "stop_string"), (0, "stop_token_id"), (None, None)]
)
def test_what_ended_the_answer(reason: int | str | None, field: str | None) -> None:
    response = responses.generate_response(dataclasses.replace(DELTA, stop_reason=reason), "id")
    assert response.WhichOneof("stop_reason") == field
    assert field is None or getattr(response, field) == reason


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
    assert [getattr(responses.load(load), name) for name in names] == list(range(len(names)))
