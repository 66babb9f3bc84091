"""`/v1/chat/completions`."""

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.core.errors import InvalidRequest
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.answer_plan import AnswerPlan
from jaxserve.server.context import ServerContext
from jaxserve.server.http import fields
from jaxserve.server.http.answer_parser import AnswerParser
from jaxserve.server.http.chat_answer import ChatAnswer, ChatEvents, ChatHead
from jaxserve.server.http.conversation import (
    ConversationPrompt,
    Effort,
    Messages,
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
from jaxserve.server.http.message_parser import MessageParser, PlainText
from jaxserve.server.http.param_names import callers_names
from jaxserve.server.http.sse import EventStream
from jaxserve.server.reasoning.thought_tokens import ThoughtTokens
from jaxserve.server.security.caller import on_account
from jaxserve.server.tools.tool import read_tool_choice, read_tools
from jaxserve.tokenizers.messages import template_messages


class ChatRequest(fields.GenerationFields):
    """The body of a chat completion request."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: int | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    # Nothing is stored, as in vLLM where no store is set up; these say what to do with what is.
    store: bool | None = None
    metadata: dict[str, str] | None = None


def chat_router(context: ServerContext) -> APIRouter:
    """The route, for the engine of a context."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        engine = context.engine_for(body.model or "")
        with callers_names(body, _names(body)):
            plan = _plan(body, context)
            prompt = await conversation_prompt(
                body.messages,
                plan,
                context,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                variables=body.chat_template_kwargs,
                effort=body.reasoning_effort,
            )
            job = _job(body, request, context, engine, plan, prompt)
            head = ChatHead(
                id=f"chatcmpl-{job.request_id}",
                model=engine.model_info.name,
                names=TokenNames(engine.tokenizer, as_ids=bool(body.return_tokens_as_token_ids)),
                job=job,
                parsers=[_parser(body, plan, prompt, job) for _ in range(job.num_choices)],
                thoughts=_thoughts(plan, prompt, job.num_choices),
                with_token_ids=bool(body.return_token_ids),
                echo=_echoed(body),
            )
            generation = await begin(request, context, engine, job)
        if body.stream:
            return EventStream(generation, ChatEvents(head, body.stream_options))
        return json_response(await collect(request, generation, ChatAnswer(head)))

    return router


def _names(body: ChatRequest) -> dict[str, str]:
    """What this API calls parameters of the engine."""
    names = {"prompt": "messages", "logprobs": "top_logprobs"}
    if body.max_tokens is None and body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    return names


def _plan(body: ChatRequest, context: ServerContext) -> AnswerPlan:
    tools, form = read_tools(body.tools, context.limits), context.answer_format()
    return AnswerPlan(
        form=form,
        tools=tools,
        choice=read_tool_choice(body.tool_choice, tools),
        is_parallel=body.parallel_tool_calls is not False,
        thinking_budget=thinking_budget(body.thinking_token_budget, body.reasoning_effort, form),
    )


def _parser(
    body: ChatRequest, plan: AnswerPlan, prompt: ConversationPrompt, job: Job
) -> MessageParser:
    if plan.is_plain:
        return PlainText()
    reader = plan.reader(prompt.begun, job.params)
    return AnswerParser(reader, with_reasoning=body.include_reasoning is not False)


def _thoughts(plan: AnswerPlan, prompt: ConversationPrompt, count: int) -> list[ThoughtTokens]:
    counters = (plan.thought_tokens(prompt.begun) for _ in range(count))
    return [counter for counter in counters if counter is not None]


def _job(
    body: ChatRequest,
    request: Request,
    context: ServerContext,
    engine: AsyncEngine,
    plan: AnswerPlan,
    prompt: ConversationPrompt,
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
    return Job(
        request_id=request_id_of(request, body.request_id),
        prompts=[prompt.token_ids],
        params=plan.shaped(params, prompt.begun),
        service=on_account(fields.service_params(body, traceparent_of(request))),
        asks_max_tokens=_max_tokens(body) is not None,
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


def _echoed(body: ChatRequest) -> str:
    """What the answer begins with if the request has `echo`: the message that it continues."""
    last = template_messages(body.messages[-1:])[0]
    return last["content"] if body.echo and last["role"] == "assistant" else ""
