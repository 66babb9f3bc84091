"""Refusals that pass say when to come back, over gRPC as over HTTP."""

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from jaxserve.core import errors
from jaxserve.server.http.errors import response_to
from jaxserve.server.retry import retry_metadata
from jaxserve.server.status import status_of


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (errors.RateLimited("a", retry_after=7.2), 8), (errors.RateLimited("a"), 1),
        (errors.QueueFull("full"), 1), (errors.TargetMissed("late"), 1), (errors.Draining("x"), 1),
        (errors.InvalidRequest("no"), None), (errors.RequestTooLarge("no"), None),
        (errors.StreamStalled("no"), None), (errors.EngineDead("no"), None),
    ],
)  # fmt: skip
def test_the_same_delay_over_both(error: errors.JaxserveError, seconds: int | None) -> None:
    code, message = status_of(error)
    metadata: dict[str, Any] = dict(retry_metadata(error, code, message))
    http = response_to(error).headers.get("Retry-After")
    if seconds is None:
        assert not metadata and http is None
        return
    assert http == metadata["retry-after"] == str(seconds)
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    assert (status.code, status.message) == (code.value[0], message)
    info = error_details_pb2.RetryInfo()
    [detail] = status.details
    assert detail.Unpack(info) and info.retry_delay.seconds == seconds


def test_it_travels_with_the_call(serving, make_request) -> None:
    async def main() -> None:
        async with serving(None) as s:
            call = s.stub.Generate(make_request())
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
            trailing = dict(await call.trailing_metadata())
            status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
            assert status.details[0].Unpack(error_details_pb2.RetryInfo())

    asyncio.run(main())
