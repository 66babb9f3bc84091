"""`/v1/chat/completions`."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.core.errors import InvalidRequest
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.context import ServerContext
from jaxserve.server.http import fields
from jaxserve.server.http.chat_answer import ChatAnswer, ChatEvents, ChatHead
from jaxserve.server.http.generation import (
    Job,
    begin,
    collect,
    json_response,
    request_id_of,
    traceparent_of,
)
from jaxserve.server.http.logprobs import TokenNames
from jaxserve.server.http.message_parser import PlainText
from jaxserve.server.http.sse import EventStream
from jaxserve.server.prompts import chat_token_ids
from jaxserve.server.security.caller import on_account


class TextPart(fields.Body):
    """A piece of a message's content. There are no others: the model reads only text."""

    type: Literal["text"]
    text: str


class Message(fields.Body):
    """One turn of a conversation."""

    role: Annotated[str, Field(min_length=1)]
    content: str | list[TextPart]
    name: str | None = None


class ChatRequest(fields.GenerationFields):
    """The body of a chat completion request."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None


def chat_router(context: ServerContext) -> APIRouter:
    """The route, for the engine of a context."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        engine = context.engine_for(body.model or "")
        job = await _job(body, request, context, engine)
        head = ChatHead(
            id=f"chatcmpl-{job.request_id}",
            model=engine.model_info.name,
            names=TokenNames(engine.tokenizer, as_ids=bool(body.return_tokens_as_token_ids)),
            job=job,
            parsers=[PlainText() for _ in range(job.num_choices)],
            with_token_ids=bool(body.return_token_ids),
            echo=_echoed(body),
        )
        generation = await begin(request, context, engine, job)
        if body.stream:
            return EventStream(generation, ChatEvents(head, body.stream_options))
        return json_response(await collect(request, generation, ChatAnswer(head)))

    return router


async def _job(
    body: ChatRequest, request: Request, context: ServerContext, engine: AsyncEngine
) -> Job:
    fields.check_stream_options(body)
    context.limits.check("max_n", body.n or 1, "n")
    params = fields.sampling_params(
        body,
        engine.model_info,
        context.limits,
        max_tokens=_max_tokens(body),
        logprobs=_logprobs(body),
        prompt_logprobs=body.prompt_logprobs,
        grammar=fields.response_format_grammar(body.response_format),
    )
    service = on_account(fields.service_params(body, traceparent_of(request)))
    answer = True if body.add_generation_prompt is None else body.add_generation_prompt
    prompt = await chat_token_ids(
        plain_messages(body.messages),
        engine.tokenizer,
        context.limits,
        add_generation_prompt=answer,
    )
    return Job(
        request_id=request_id_of(request, body.request_id),
        prompts=[prompt],
        params=params,
        service=service,
        n=body.n or 1,
    )


def _max_tokens(body: ChatRequest) -> int | None:
    given = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(given) > 1:
        raise InvalidRequest(
            "max_tokens and max_completion_tokens are the same, and differ here",
            param="max_tokens",
        )
    return given.pop() if given else None


def _logprobs(body: ChatRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    return None


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages with text for content; the pieces of one become lines, as in vLLM."""
    return [
        {
            "role": message.role,
            "content": message.content
            if isinstance(message.content, str)
            else "\n".join(part.text for part in message.content),
            **({"name": message.name} if message.name is not None else {}),
        }
        for message in messages
    ]


def _echoed(body: ChatRequest) -> str:
    """What the answer begins with if the request has `echo`: the message that it continues."""
    last = plain_messages(body.messages[-1:])[0]
    return last["content"] if body.echo and last["role"] == "assistant" else ""
