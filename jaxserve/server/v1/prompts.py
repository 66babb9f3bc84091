"""Prompts of the protocol, in whichever of their forms, as token ids."""

from jaxserve.core.errors import InvalidRequest
from jaxserve.server.limits import RequestLimits
from jaxserve.server.prompts import chat_token_ids, given_token_ids, text_token_ids
from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.tokenizers.base import Tokenizer

Request = pb.GenerateRequest | pb.EmbedRequest | pb.TokenizeRequest


async def prompt_token_ids(
    request: Request, tokenizer: Tokenizer, max_model_len: int, limits: RequestLimits
) -> list[int]:
    """The prompt of a request as token ids, whichever of its forms it has.

    Raises:
        InvalidRequest: there is no prompt, it is empty, it is longer than `max_model_len`
            (token ids) or the limits allow (texts), or the chat template refuses it.
    """
    kind = request.WhichOneof("prompt")
    special = True
    if isinstance(request, pb.TokenizeRequest) and request.HasField("add_special_tokens"):
        if kind == "chat":
            raise InvalidRequest("add_special_tokens does not apply to chat: the template decides")
        special = request.add_special_tokens
    if kind == "text":
        return await text_token_ids(
            request.text, tokenizer, limits, add_special_tokens=special, param="text"
        )
    if kind == "chat":
        chat = request.chat
        answer = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
        messages = [{"role": m.role, "content": m.content} for m in chat.messages]
        return await chat_token_ids(messages, tokenizer, limits, add_generation_prompt=answer)
    if kind == "token_ids" and not isinstance(request, pb.TokenizeRequest):
        return given_token_ids(request.token_ids.ids, max_model_len, param="token_ids")
    raise InvalidRequest("the request has no prompt", param="prompt")
