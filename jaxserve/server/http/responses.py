"""`/v1/responses`: text in, text out; nothing is stored between requests."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.grammar import Grammar
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.context import ServerContext
from jaxserve.server.http import fields
from jaxserve.server.http.generation import (
    Job,
    begin,
    collect,
    json_response,
    request_id_of,
    traceparent_of,
)
from jaxserve.server.http.logprobs import TokenNames
from jaxserve.server.http.response_answer import ResponseAnswer, ResponseEvents, ResponseHead
from jaxserve.server.http.sse import EventStream
from jaxserve.server.prompts import chat_token_ids
from jaxserve.server.security.caller import on_account

LOGPROBS = "message.output_text.logprobs"


class InputText(fields.Body):
    """A piece of a message; an answer's own pieces can be sent back as they came."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(fields.Body):
    """One turn of a conversation; an answer's own message can be sent back as it came."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class TextFormat(fields.Body):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextConfig(fields.Body):
    """Settings of the answer's text."""

    format: TextFormat | None = None


class ResponsesStreamOptions(fields.Body):
    """Settings of a stream."""

    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(fields.SamplingFields):
    """The body of a response request."""

    input: str | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    text: TextConfig | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    metadata: dict[str, str] | None = None


def responses_router(context: ServerContext) -> APIRouter:
    """The route, for the engine of a context."""
    router = APIRouter()

    @router.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer a text or a conversation."""
        engine = context.engine_for(body.model or "")
        job = await _job(body, request, context, engine)
        head = ResponseHead(
            id=f"resp_{job.request_id}",
            model=engine.model_info.name,
            names=TokenNames(engine.tokenizer),
            settings=_settings(body),
        )
        generation = await begin(request, context, engine, job)
        if body.stream:
            return EventStream(generation, ResponseEvents(head))
        return json_response(await collect(request, generation, ResponseAnswer(head)))

    return router


async def _job(
    body: ResponsesRequest, request: Request, context: ServerContext, engine: AsyncEngine
) -> Job:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest(
            "stream_options is only allowed when stream is true", param="stream_options"
        )
    params = fields.sampling_params(
        body,
        engine.model_info,
        context.limits,
        max_tokens=body.max_output_tokens,
        logprobs=_logprobs(body),
        grammar=_grammar(body.text),
    )
    service = on_account(fields.service_params(body, traceparent_of(request)))
    prompt = await chat_token_ids(_messages(body), engine.tokenizer, context.limits)
    return Job(
        request_id=request_id_of(request, body.request_id),
        prompts=[prompt],
        params=params,
        service=service,
    )


def _logprobs(body: ResponsesRequest) -> int | None:
    if LOGPROBS in (body.include or ()):
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequest(f"top_logprobs needs {LOGPROBS!r} in include", param="top_logprobs")
    return None


def _grammar(text: TextConfig | None) -> Grammar | None:
    given = text and text.format
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return Grammar("json_object")
    return fields.schema_grammar(given.schema_, "text.format.schema")


def _messages(body: ResponsesRequest) -> list[dict[str, str]]:
    """The conversation as chat templates know it: they have no role `developer`."""
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for message in body.input:
        content = message.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": content})
    return messages


def _settings(body: ResponsesRequest) -> dict[str, Any]:
    """What the answer repeats of the request, and what is always so here."""
    format_ = body.text and body.text.format
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {
            "format": format_.model_dump(by_alias=True, exclude_none=True)
            if format_
            else {"type": "text"}
        },
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }
