"""Which gRPC status each error becomes: the one table."""

import grpc

from jaxserve.core import errors

# A status line travels as an HTTP/2 header; a message that quotes the request could be huge.
MAX_MESSAGE_CHARS = 1000

STATUS_CODES: dict[type[errors.JaxserveError], grpc.StatusCode] = {
    errors.RequestTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,  # as gRPC itself has it
    errors.UnsupportedMediaType: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Unsupported: grpc.StatusCode.UNIMPLEMENTED,
    errors.RateLimited: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ModelNotFound: grpc.StatusCode.NOT_FOUND,
    errors.QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.TargetMissed: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.RequestFailed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.StreamStalled: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.StepHung: grpc.StatusCode.INTERNAL,
    errors.EngineDead: grpc.StatusCode.INTERNAL,
    errors.ConfigError: grpc.StatusCode.INTERNAL,
    errors.CheckpointError: grpc.StatusCode.INTERNAL,
    errors.CompileAfterReady: grpc.StatusCode.INTERNAL,
    errors.JaxserveError: grpc.StatusCode.INTERNAL,
}


def status_of(error: errors.JaxserveError) -> tuple[grpc.StatusCode, str]:
    """The gRPC status code and message for an error, by its nearest listed base class."""
    code = next(STATUS_CODES[cls] for cls in type(error).__mro__ if cls in STATUS_CODES)
    message = str(error)
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[: MAX_MESSAGE_CHARS - 3] + "..."
    return code, message
