"""When a refused caller should come back: one rule, told in each protocol's terms."""

import math

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from jaxserve.core.errors import Draining, JaxserveError, QueueFull, RateLimited, TargetMissed

_PASSING = (RateLimited, QueueFull, TargetMissed, Draining)
_LEAST_SECONDS = 1


def retry_seconds(error: JaxserveError) -> int | None:
    """Whole seconds after which the same call may succeed; None where waiting does not help."""
    if not isinstance(error, _PASSING):
        return None
    return max(_LEAST_SECONDS, math.ceil(getattr(error, "retry_after", None) or 0))


def retry_metadata(
    error: JaxserveError, code: grpc.StatusCode, message: str
) -> tuple[tuple[str, str | bytes], ...]:
    """What a gRPC refusal has in its trailing metadata; empty where waiting does not help.

    It is `google.rpc.RetryInfo` in the status details, which gRPC's retry policies and client
    libraries go by, and `retry-after` in seconds, as HTTP has it.

    Args:
        error: why the call is refused.
        code, message: the status that the call ends with, which the details repeat.
    """
    seconds = retry_seconds(error)
    if seconds is None:
        return ()
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=seconds)))
    status = status_pb2.Status(code=code.value[0], message=message, details=[detail])
    return (
        ("retry-after", str(seconds)),
        ("grpc-status-details-bin", status.SerializeToString()),
    )
