"""Between the protocol's messages and the engine's types; requests are checked strictly."""

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.request import FinishReason
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.engine.outputs import EngineLoad, ModelInfo, TokenDelta
from jaxserve.server import prompts
from jaxserve.server.limits import RequestLimits
from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.tokenizers.base import Tokenizer

DEFAULT_MAX_TOKENS = 256
MAX_REQUEST_ID_CHARS = 256

_FINISH_REASONS: dict[FinishReason, pb.FinishReason] = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}
_OPTIONAL_PARAMS = (
    "temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "ignore_eos",
)  # fmt: skip

M = TypeVar("M", bound=Message)


def reject_unknown_fields(message: Message) -> None:
    """Refuse a message that carries fields of a newer protocol, at any depth.

    Raises:
        InvalidRequest: the message of that name has fields that this server does not know.
    """
    unknown = sorted({field.field_number for field in UnknownFieldSet(message)})
    if unknown:
        raise InvalidRequest(
            f"{message.DESCRIPTOR.name} has fields that this server does not know: "
            f"numbers {', '.join(map(str, unknown[:10]))}"
        )
    for child in _children(message):
        reject_unknown_fields(child)


def _children(message: Message) -> Iterator[Message]:
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if isinstance(value, Message):
            yield value
        else:
            yield from value


def sampling_params(message: pb.SamplingParams, *, vocab_size: int) -> SamplingParams:
    """The engine's sampling parameters; unset fields take the protocol's defaults.

    Raises:
        InvalidRequest: a value is out of range, or a stop token is not in the vocabulary.
    """
    given: dict[str, Any] = {
        name: getattr(message, name) for name in _OPTIONAL_PARAMS if message.HasField(name)
    }
    given.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    stop_token_ids = tuple(message.stop_token_ids)
    if stop_token_ids and max(stop_token_ids) >= vocab_size:
        raise InvalidRequest(
            f"stop_token_ids must be in [0, {vocab_size}), got {max(stop_token_ids)}"
        )
    return SamplingParams(stop=tuple(message.stop), stop_token_ids=stop_token_ids, **given)


def service_params(message: pb.ServiceParams) -> ServiceParams:
    """The engine's service parameters.

    Raises:
        InvalidRequest: a value is out of range.
    """
    targets = {
        name: getattr(message, f"{name}_ms") / 1000
        for name in ("ttft_target", "tpot_target")
        if message.HasField(f"{name}_ms")
    }
    return ServiceParams(
        tenant=message.tenant, priority=message.priority, cache_salt=message.cache_salt, **targets
    )


def request_id(text: str) -> str | None:
    """A caller's request id, or None if the server is to draw one.

    Raises:
        InvalidRequest: the id is too long.
    """
    if len(text) > MAX_REQUEST_ID_CHARS:
        raise InvalidRequest(
            f"request_id must have at most {MAX_REQUEST_ID_CHARS} characters, got {len(text)}"
        )
    return text or None


async def prompt_token_ids(
    request: pb.GenerateRequest | pb.TokenizeRequest,
    tokenizer: Tokenizer,
    max_model_len: int,
    limits: RequestLimits,
) -> list[int]:
    """The prompt of a request as token ids, whichever of its forms it has.

    Raises:
        InvalidRequest: there is no prompt, it is empty, it is longer than `max_model_len`
            (token ids) or the limits, or the chat template refuses it.
    """
    kind = request.WhichOneof("prompt")
    if kind == "text":
        special = _add_special_tokens(request)
        return await prompts.text_token_ids(
            request.text, tokenizer, limits, add_special_tokens=special
        )
    if kind == "chat":
        return await _chat_token_ids(request, tokenizer, limits)
    if kind == "token_ids" and isinstance(request, pb.GenerateRequest):
        return prompts.given_token_ids(request.token_ids.ids, max_model_len)
    raise InvalidRequest("the request has no prompt")


def _add_special_tokens(request: pb.GenerateRequest | pb.TokenizeRequest) -> bool:
    if isinstance(request, pb.TokenizeRequest) and request.HasField("add_special_tokens"):
        return request.add_special_tokens
    return True


async def _chat_token_ids(
    request: pb.GenerateRequest | pb.TokenizeRequest, tokenizer: Tokenizer, limits: RequestLimits
) -> list[int]:
    if isinstance(request, pb.TokenizeRequest) and request.HasField("add_special_tokens"):
        raise InvalidRequest("add_special_tokens does not apply to chat: the template decides")
    chat = request.chat
    messages = [{"role": m.role, "content": m.content} for m in chat.messages]
    answer = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
    return await prompts.chat_token_ids(messages, tokenizer, limits, add_generation_prompt=answer)


def generate_response(delta: TokenDelta) -> pb.GenerateResponse:
    """One message of a Generate stream; usage and finish reason only on the last one."""
    response = pb.GenerateResponse(
        request_id=delta.request_id, text=delta.text, token_ids=delta.token_ids
    )
    if delta.finish_reason is not None:
        response.finish_reason = _FINISH_REASONS[delta.finish_reason]
        response.usage.prompt_tokens = delta.num_prompt_tokens
        response.usage.completion_tokens = delta.num_output_tokens
        response.usage.cached_tokens = delta.num_cached_tokens
    return response


def model_info(info: ModelInfo) -> pb.GetModelInfoResponse:
    """The served model's facts; the message's fields have the dataclass's names."""
    return _same_names(info, pb.GetModelInfoResponse)


def load(load: EngineLoad) -> pb.GetLoadResponse:
    """The engine's load; the message's fields have the dataclass's names."""
    return _same_names(load, pb.GetLoadResponse)


def _same_names(value: ModelInfo | EngineLoad, message: type[M]) -> M:
    names = (field.name for field in dataclasses.fields(value))
    return message(**{name: getattr(value, name) for name in names})
