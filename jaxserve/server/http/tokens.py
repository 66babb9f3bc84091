"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from jaxserve.core.errors import InvalidRequest
from jaxserve.server.answer_plan import AnswerPlan
from jaxserve.server.context import ServerContext
from jaxserve.server.http import fields
from jaxserve.server.http.conversation import Effort, conversation_prompt
from jaxserve.server.http.generation import json_response
from jaxserve.server.http.logprobs import TokenNames
from jaxserve.server.prompts import off_loop, text_token_ids
from jaxserve.server.tools.tool import read_tool_choice, read_tools

_OF_MESSAGES = (
    "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "reasoning_effort",
    "tools",
)  # fmt: skip


class TokenizeRequest(fields.Body):
    """A text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    tools: list[Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(fields.Body):
    """Token ids."""

    model: str | None = None
    tokens: fields.TokenIds


def tokens_router(context: ServerContext) -> APIRouter:
    """The routes, for the engine of a context."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        """The token ids of a text, or of a conversation by the model's template."""
        engine = context.engine_for(body.model or "")
        ids = await _token_ids(body, context)
        answer = {
            "count": len(ids),
            "max_model_len": engine.model_info.max_model_len,
            "tokens": ids,
            "token_strs": None,
        }
        if body.return_token_strs:
            names = TokenNames(engine.tokenizer)
            answer["token_strs"] = [names.text(token) for token in ids]
        return json_response(answer)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special tokens included."""
        engine = context.engine_for(body.model or "")
        tokens, vocab_size = body.tokens, engine.model_info.vocab_size
        context.limits.check("max_prompt_chars", len(tokens), "tokens")
        if tokens and max(tokens) >= vocab_size:
            raise InvalidRequest(f"tokens: ids are in [0, {vocab_size})", param="tokens")
        text = await off_loop(
            len(tokens), lambda: engine.tokenizer.decode(tokens, skip_special_tokens=False)
        )
        return json_response({"prompt": text})

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """The tokenizer's configuration: its class, special tokens and chat template."""
        return json_response(context.engine_for().tokenizer.config())

    return router


async def _token_ids(body: TokenizeRequest, context: ServerContext) -> list[int]:
    tokenizer = context.engine_for().tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("there must be either a prompt or messages", param="prompt")
    if body.prompt is not None:
        for name in _OF_MESSAGES:
            if getattr(body, name) is not None:
                raise InvalidRequest(f"{name} applies only to messages", param=name)
        special = True if body.add_special_tokens is None else body.add_special_tokens
        if not body.prompt:  # no prompt to answer, but a text like any other
            return tokenizer.encode("", add_special_tokens=special)
        return await text_token_ids(
            body.prompt, tokenizer, context.limits, add_special_tokens=special
        )
    if body.add_special_tokens:
        raise InvalidRequest(
            "add_special_tokens does not apply to messages: the template decides",
            param="add_special_tokens",
        )
    tools = read_tools(body.tools, context.limits)
    plan = AnswerPlan(
        form=context.answer_format(), tools=tools, choice=read_tool_choice(None, tools)
    )
    prompt = await conversation_prompt(
        body.messages or [],
        plan,
        context,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=body.chat_template_kwargs,
        effort=body.reasoning_effort,
    )
    return prompt.token_ids
