"""What the engine says, as messages of the protocol."""

from typing import TypeVar

from google.protobuf.message import Message

from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.request import FinishReason
from jaxserve.engine.outputs import Embedding, EngineLoad, ModelInfo, TokenDelta
from jaxserve.server.v1 import jaxserve_pb2 as pb

_FINISH_REASONS: dict[FinishReason, pb.FinishReason] = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}

M = TypeVar("M", bound=Message)


def generate_response(delta: TokenDelta, request_id: str, index: int = 0) -> pb.GenerateResponse:
    """One message of a Generate stream; usage and finish reason only on an answer's last one.

    Args:
        delta: what is new.
        request_id: the call's, which all its answers have in common.
        index: which answer it belongs to.
    """
    response = pb.GenerateResponse(
        request_id=request_id, text=delta.text, token_ids=delta.token_ids, index=index
    )
    if delta.logprobs:
        response.logprobs.extend(map(_logprobs, delta.logprobs))
    if delta.prompt_logprobs and index == 0:  # the prompt is the same for all
        response.prompt_logprobs.extend(map(_logprobs, delta.prompt_logprobs))
    if delta.finish_reason is not None:
        response.finish_reason = _FINISH_REASONS[delta.finish_reason]
        response.usage.prompt_tokens = delta.num_prompt_tokens
        response.usage.completion_tokens = delta.num_output_tokens
        response.usage.cached_tokens = delta.num_cached_tokens
    if isinstance(delta.stop_reason, str):
        response.stop_string = delta.stop_reason
    elif delta.stop_reason is not None:
        response.stop_token_id = delta.stop_reason
    return response


def _logprobs(logprobs: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(**logprobs._asdict())  # the same names


def embed_response(embedding: Embedding) -> pb.EmbedResponse:
    """A text's vector."""
    return pb.EmbedResponse(
        values=embedding.values, usage=pb.Usage(prompt_tokens=embedding.num_prompt_tokens)
    )


def model_info(info: ModelInfo) -> pb.GetModelInfoResponse:
    """The served model's facts; the message's fields are some of the dataclass's."""
    return _same_names(info, pb.GetModelInfoResponse)


def load(load: EngineLoad) -> pb.GetLoadResponse:
    """The engine's load; the message's fields have the dataclass's names."""
    return _same_names(load, pb.GetLoadResponse)


def _same_names(value: ModelInfo | EngineLoad, message: type[M]) -> M:
    names = message.DESCRIPTOR.fields_by_name
    return message(**{name: getattr(value, name) for name in names})
