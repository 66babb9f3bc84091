"""API keys on gRPC calls."""

from collections.abc import Awaitable, Callable

import grpc

from jaxserve.core.errors import Unauthenticated
from jaxserve.server.security.caller import set_caller
from jaxserve.server.security.keys import ApiKeys
from jaxserve.server.status import status_of

_OPEN = (  # health: whole services, or single methods
    "/grpc.health.v1.Health/",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
    "/inference.GRPCInferenceService/ModelReady",
    "/vllm.grpc.engine.VllmEngine/HealthCheck",
)


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Lets calls pass that bring a known API key, and makes its tenant their caller.

    The key is in the metadata `authorization`, as HTTP has it: `Bearer KEY`. Health checks need
    none.

    Args:
        keys: those that are known.
    """

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Go on to the method, or to one that only refuses."""
        if not handler_call_details.method.startswith(_OPEN):
            metadata = dict(handler_call_details.invocation_metadata or ())
            header = metadata.get("authorization")
            try:
                caller = self._keys.caller(header if isinstance(header, str) else None)
            except Unauthenticated as error:
                return _refusal(error)
            set_caller(caller)  # gRPC runs interceptors and the method in one task of the call's
        return await continuation(handler_call_details)


def _refusal(error: Unauthenticated) -> grpc.RpcMethodHandler:
    async def refuse(requests: object, context: grpc.aio.ServicerContext) -> None:
        del requests
        await context.abort(*status_of(error))

    # Whatever the method is: this kind of handler is called without waiting for a request.
    return grpc.stream_stream_rpc_method_handler(refuse)
