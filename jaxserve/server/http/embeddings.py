"""`/v1/embeddings`."""

import asyncio
import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.service_params import ServiceParams
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.outputs import Embedding, ModelInfo
from jaxserve.server.context import ServerContext
from jaxserve.server.http import fields
from jaxserve.server.http.completions import as_prompts, prompt_token_ids
from jaxserve.server.http.generation import (
    json_response,
    request_id_of,
    traceparent_of,
    until_disconnect,
)
from jaxserve.server.security.caller import on_account


class EmbeddingRequest(fields.ServiceFields):
    """The body of an embedding request."""

    input: fields.Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    add_special_tokens: bool | None = None


def embeddings_router(context: ServerContext) -> APIRouter:
    """The route, for the engine of a context."""
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Turn one or more texts into vectors."""
        engine = context.engine_for(body.model or "")
        service = on_account(fields.service_params(body, traceparent_of(request)))
        request_id = request_id_of(request, body.request_id)
        _check_dimensions(body.dimensions, engine.model_info)
        texts = as_prompts(body.input, param="input")
        context.limits.check("max_prompts", len(texts), "input")
        special = True if body.add_special_tokens is None else body.add_special_tokens
        prompts = [
            await prompt_token_ids(text, engine, context, add_special_tokens=special, param="input")
            for text in texts
        ]
        ids = [f"{request_id}-{i}" for i in range(len(prompts))]
        if len(prompts) == 1:
            ids = [request_id]
        with context.answering(), context.several(request_id, ids):
            found = await until_disconnect(
                request.receive, _embed_all(engine, ids, prompts, service)
            )
        return json_response(_answer(found, engine.model_info.name, body))

    return router


async def _embed_all(
    engine: AsyncEngine,
    ids: Sequence[str],
    prompts: Sequence[Sequence[int]],
    service: ServiceParams,
) -> list[Embedding]:
    """The vectors of all texts; the first error aborts the others and is raised alone.

    The engine gets no more of them at a time than keep it busy, so that they do not fill its
    waiting queue, which is there for all callers.
    """
    room = asyncio.Semaphore(2 * engine.model_info.max_num_seqs)

    async def embed(text_id: str, prompt: Sequence[int]) -> Embedding:
        async with room:
            return await engine.embed(text_id, prompt, service)

    tasks = [
        asyncio.ensure_future(embed(i, prompt)) for i, prompt in zip(ids, prompts, strict=True)
    ]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _check_dimensions(dimensions: int | None, info: ModelInfo) -> None:
    """Refuse a size for which the model's embeddings were not trained."""
    allowed = info.matryoshka_dimensions
    if dimensions is None or (info.is_matryoshka and (not allowed or dimensions in allowed)):
        return
    if not info.is_matryoshka:
        why = "the model says of no size that its embeddings may be cut to it"
    else:
        why = f"the model's embeddings may be cut to {', '.join(map(str, allowed))}"
    raise InvalidRequest(f"dimensions is not supported: {why}", param="dimensions")


def _answer(found: Sequence[Embedding], model: str, body: EmbeddingRequest) -> dict[str, Any]:
    num_tokens = sum(embedding.num_prompt_tokens for embedding in found)
    return {
        "object": "list",
        "model": model,
        "data": [
            {
                "object": "embedding",
                "index": i,
                "embedding": _encoded(_cut(each.values, body.dimensions), body.encoding_format),
            }
            for i, each in enumerate(found)
        ],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _cut(values: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first elements of a vector, float32 [hidden], of length 1 again."""
    if dimensions is None:
        return values
    if dimensions > len(values):
        raise InvalidRequest(
            f"dimensions is {dimensions}, the model's embeddings have {len(values)}",
            param="dimensions",
        )
    head = values[:dimensions]
    return head / max(float(np.linalg.norm(head)), 1e-12)


def _encoded(values: np.ndarray, encoding: str | None) -> str | list[float]:
    """A vector, float32 [hidden], as numbers or as the base64 of little-endian float32."""
    if encoding == "base64":
        return base64.b64encode(values.astype("<f4").tobytes()).decode()
    return values.astype(float).tolist()
