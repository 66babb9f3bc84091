"""Routes that tell about the server: health, version, models."""

import importlib.metadata
import time

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from jaxserve.core.errors import ModelNotFound
from jaxserve.engine.outputs import ModelInfo
from jaxserve.server.context import ServerContext


def info_router(context: ServerContext) -> APIRouter:
    """The routes, for the engine of a context."""
    router = APIRouter()
    created, max_tokens = int(time.time()), context.limits.default_max_tokens

    @router.post("/ping")
    @router.get("/ping")  # as Amazon SageMaker asks, and vLLM answers
    @router.get("/health")
    async def health() -> Response:
        """200 while new requests are taken, else 503."""
        ready = context.engine is not None and context.engine.is_ready
        status = {"status": "ready" if ready else "not ready"}
        return JSONResponse(status, 200 if ready else 503)

    @router.get("/version")
    async def version() -> Response:
        """The server's version."""
        return JSONResponse({"version": importlib.metadata.version("jaxserve")})

    @router.get("/v1/models")
    async def models() -> Response:
        """The served model, in a list."""
        info = context.engine_for().model_info
        return JSONResponse({"object": "list", "data": [_model(info, created, max_tokens)]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """The served model, by its name."""
        info = context.engine_for().model_info
        if name != info.name:
            raise ModelNotFound(f"model {name!r} is not served here; {info.name!r} is")
        return JSONResponse(_model(info, created, max_tokens))

    return router


def _model(info: ModelInfo, created: int, max_tokens: int) -> dict[str, object]:
    return {
        "id": info.name,
        "object": "model",
        "created": created,
        "owned_by": "jaxserve",
        "max_model_len": info.max_model_len,
        "default_sampling_params": {"max_tokens": max_tokens, **info.default_sampling_params},
    }
