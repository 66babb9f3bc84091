"""`/v1/responses`: text and calls of functions; nothing is stored between requests."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.grammar import Grammar
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.answer_plan import AnswerPlan
from jaxserve.server.context import ServerContext
from jaxserve.server.http import fields
from jaxserve.server.http.conversation import (
    ConversationPrompt,
    Effort,
    conversation_prompt,
    thinking_budget,
)
from jaxserve.server.http.generation import (
    Job,
    begin,
    collect,
    json_response,
    request_id_of,
    traceparent_of,
)
from jaxserve.server.http.logprobs import TokenNames
from jaxserve.server.http.param_names import callers_names
from jaxserve.server.http.response_answer import ResponseAnswer, ResponseEvents, ResponseHead
from jaxserve.server.http.response_input import response_messages
from jaxserve.server.http.sse import EventStream
from jaxserve.server.http.truncation import truncated_prompt
from jaxserve.server.security.caller import on_account
from jaxserve.server.tools.tool import read_tool_choice, read_tools

LOGPROBS = "message.output_text.logprobs"
# Beside it there are only things to include that no answer here has, or that it has anyway:
# thoughts are in the clear.
Includable = Literal[
    "message.output_text.logprobs", "reasoning.encrypted_content", "file_search_call.results",
    "web_search_call.results", "web_search_call.action.sources", "code_interpreter_call.outputs",
    "message.input_image.image_url", "computer_call_output.output.image_url",
]  # fmt: skip

# What this API calls parameters of the engine.
_NAMES = {
    "prompt": "input", "messages": "input", "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
}  # fmt: skip


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


class ReasoningConfig(fields.Body):
    """How the model thinks; it is never summed up, for its thoughts are in the answer."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesStreamOptions(fields.Body):
    """Settings of a stream."""

    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(fields.SamplingFields):
    """The body of a response request."""

    input: Annotated[
        Annotated[str, Tag("[text]")]
        | Annotated[list[dict[str, Any]], Field(min_length=1), Tag("[items]")],
        Discriminator(lambda given: "[text]" if isinstance(given, str) else "[items]"),
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    reasoning: ReasoningConfig | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    text: TextConfig | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    include: list[Includable] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None  # nothing is, and the answer says so
    truncation: Literal["auto", "disabled"] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    # As in vLLM
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_token_budget: int | None = None


def responses_router(context: ServerContext) -> APIRouter:
    """The route, for the engine of a context."""
    router = APIRouter()

    @router.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer a text or a conversation."""
        engine = context.engine_for(body.model or "")
        with callers_names(body, _NAMES):
            plan = _plan(body, context)
            prompt = await _prompt(body, plan, context)
            job = _job(body, request, context, engine, plan, prompt)
            head = ResponseHead(
                id=f"resp_{job.request_id}",
                model=engine.model_info.name,
                names=TokenNames(engine.tokenizer),
                settings=_settings(body),
                reader=None if plan.is_plain else plan.reader(prompt.begun, job.params),
                thoughts=plan.thought_tokens(prompt.begun),
            )
            generation = await begin(request, context, engine, job)
        if body.stream:
            return EventStream(generation, ResponseEvents(head))
        return json_response(await collect(request, generation, ResponseAnswer(head)))

    @router.post("/v1/responses/input_tokens")
    async def input_tokens(body: ResponsesRequest) -> Response:
        """Count the tokens of the prompt that a response would be made from."""
        context.engine_for(body.model or "")
        with callers_names(body, _NAMES):
            prompt = await _prompt(body, _plan(body, context), context)
        return json_response(
            {"object": "response.input_tokens", "input_tokens": len(prompt.token_ids)}
        )

    return router


async def _prompt(
    body: ResponsesRequest, plan: AnswerPlan, context: ServerContext
) -> ConversationPrompt:
    messages = response_messages(body.input, body.instructions)

    async def render(messages: list[dict[str, Any]]) -> ConversationPrompt:
        return await conversation_prompt(
            messages, plan, context, variables=body.chat_template_kwargs, effort=_effort(body)
        )

    if body.truncation != "auto":
        return await render(messages)
    context_size = context.engine_for(body.model or "").model_info.max_model_len
    answer = min(body.max_output_tokens or 1, max(1, context_size // 2))
    return await truncated_prompt(messages, render, context_size - answer)


def _effort(body: ResponsesRequest) -> str | None:
    return body.reasoning and body.reasoning.effort


def _plan(body: ResponsesRequest, context: ServerContext) -> AnswerPlan:
    tools, form = read_tools(body.tools, context.limits, is_flat=True), context.answer_format()
    plan = AnswerPlan(
        form=form,
        tools=tools,
        choice=read_tool_choice(body.tool_choice, tools),
        is_parallel=body.parallel_tool_calls is not False,
        thinking_budget=thinking_budget(body.thinking_token_budget, _effort(body), form),
    )
    if LOGPROBS in (body.include or ()) and not plan.is_plain:
        raise InvalidRequest(
            f"include: {LOGPROBS!r} is not supported with tools or a reasoning parser",
            param="include",
        )
    return plan


def _job(
    body: ResponsesRequest,
    request: Request,
    context: ServerContext,
    engine: AsyncEngine,
    plan: AnswerPlan,
    prompt: ConversationPrompt,
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
    return Job(
        request_id=request_id_of(request, body.request_id),
        prompts=[prompt.token_ids],
        params=plan.shaped(params, prompt.begun),
        service=on_account(fields.service_params(body, traceparent_of(request))),
        asks_max_tokens=body.max_output_tokens is not None,
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
    return fields.schema_grammar(given.schema_, "text.format.schema", is_strict=bool(given.strict))


def _settings(body: ResponsesRequest) -> dict[str, Any]:
    """What the answer repeats of the request, and what is always so here."""
    format_ = body.text and body.text.format
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": _effort(body), "summary": None},
        "safety_identifier": body.safety_identifier,
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {
            "format": format_.model_dump(by_alias=True, exclude_none=True)
            if format_
            else {"type": "text"}
        },
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "user": body.user,
    }
