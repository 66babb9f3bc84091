"""`/v1/completions`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.context import ServerContext
from jaxserve.server.http import fields
from jaxserve.server.http.completion_answer import (
    CompletionAnswer,
    CompletionEvents,
    CompletionHead,
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
from jaxserve.server.http.sse import EventStream
from jaxserve.server.prompts import given_token_ids, text_token_ids
from jaxserve.server.security.caller import on_account
from jaxserve.tokenizers.base import Tokenizer
from jaxserve.tokenizers.fill_in_middle import FillInMiddle, fill_in_middle

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionRequest(fields.GenerationFields):
    """The body of a completion request."""

    prompt: fields.Prompt
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


def completions_router(context: ServerContext) -> APIRouter:
    """The route, for the engine of a context."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or more texts."""
        engine = context.engine_for(body.model or "")
        fields.check_stream_options(body)
        context.limits.check("max_n", body.n or 1, "n")
        _check_best_of(body)
        with callers_names(body):
            params = _params(body, engine, context)
            service = on_account(fields.service_params(body, traceparent_of(request)))
        texts = as_prompts(body.prompt)
        context.limits.check("max_prompts", len(texts), "prompt")
        special = True if body.add_special_tokens is None else body.add_special_tokens
        prompts = [
            await prompt_token_ids(text, engine, context, add_special_tokens=special)
            for text in texts
        ]
        if body.suffix:
            form, suffix = await _middle(body, engine, context)
            num_first = len(engine.tokenizer.settings.prefix_ids) if special else 0
            prompts = [
                form.prompt(ids, suffix, num_first=num_first if isinstance(text, str) else 0)
                for text, ids in zip(texts, prompts, strict=True)
            ]
            if not body.ignore_eos:
                ends = (*params.stop_token_ids, *form.ends)
                params = dataclasses.replace(params, stop_token_ids=ends)
        job = Job(
            request_id=request_id_of(request, body.request_id),
            prompts=prompts,
            params=params,
            service=service,
            asks_max_tokens=bool(body.max_tokens),
            n=body.n or 1,
        )
        head = CompletionHead(
            id=f"cmpl-{job.request_id}",
            model=engine.model_info.name,
            names=TokenNames(engine.tokenizer, as_ids=bool(body.return_tokens_as_token_ids)),
            job=job,
            num_top=body.logprobs,
            echoes=_echoes(texts, prompts, engine.tokenizer) if body.echo else None,
            with_prompt_logprobs=body.prompt_logprobs is not None,
            with_token_ids=bool(body.return_token_ids),
        )
        with callers_names(body):
            generation = await begin(request, context, engine, job)
        if body.stream:
            return EventStream(generation, CompletionEvents(head, body.stream_options))
        return json_response(await collect(request, generation, CompletionAnswer(head)))

    return router


def as_prompts(given: fields.Prompt, *, param: str = "prompt") -> Sequence[str | fields.TokenIds]:
    """The prompts that a request has, whichever of the four forms they come in.

    Raises:
        InvalidRequest: there is none.
    """
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidRequest(f"{param} is empty", param=param)
    if isinstance(given[0], int):
        return [given]  # type: ignore[list-item] - a list of ids
    return given  # type: ignore[return-value] - a list of prompts


async def prompt_token_ids(
    prompt: str | fields.TokenIds,
    engine: AsyncEngine,
    context: ServerContext,
    *,
    add_special_tokens: bool = True,
    param: str = "prompt",
) -> list[int]:
    """The token ids of one prompt.

    Raises:
        InvalidRequest: it is empty, or too long.
    """
    if isinstance(prompt, list):
        return given_token_ids(prompt, engine.model_info.max_model_len, param=param)
    return await text_token_ids(
        prompt,
        engine.tokenizer,
        context.limits,
        add_special_tokens=add_special_tokens,
        param=param,
    )


def _params(body: CompletionRequest, engine: AsyncEngine, context: ServerContext) -> SamplingParams:
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens is 0, and echo is not set", param="max_tokens")
    prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        if prompt_logprobs not in (None, body.logprobs):
            raise InvalidRequest(
                "with echo, prompt_logprobs must be the same as logprobs", param="prompt_logprobs"
            )
        prompt_logprobs = body.logprobs
    if max_tokens == 0 and prompt_logprobs is None:
        prompt_logprobs = 0  # which nobody gets to see; a request without an answer is for them
    return fields.sampling_params(
        body,
        engine.model_info,
        context.limits,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=fields.response_format_grammar(body.response_format),
    )


def _check_best_of(body: CompletionRequest) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest(
            f"best_of {body.best_of} is not supported beside n {body.n or 1}: all answers that are "
            "generated are returned; ask for n of them and choose by logprobs",
            param="best_of",
        )


async def _middle(
    body: CompletionRequest, engine: AsyncEngine, context: ServerContext
) -> tuple[FillInMiddle, list[int]]:
    """How the model fills in what comes before a suffix, and the suffix's token ids."""
    form = fill_in_middle(engine.tokenizer)
    if form is None:
        raise InvalidRequest(
            "suffix is not supported: the model's tokenizer has no tokens for filling in a middle",
            param="suffix",
        )
    if body.echo:
        raise InvalidRequest("suffix and echo cannot be had together", param="suffix")
    suffix = await text_token_ids(
        body.suffix or "",
        engine.tokenizer,
        context.limits,
        add_special_tokens=False,
        param="suffix",
    )
    return form, suffix


def _echoes(
    texts: Sequence[str | fields.TokenIds], prompts: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> list[str]:
    """The prompts as texts."""
    return [
        text if isinstance(text, str) else tokenizer.decode(ids, skip_special_tokens=False)
        for text, ids in zip(texts, prompts, strict=True)
    ]
