"""Every deliberate error has a status, and what it says fits into a header."""

import grpc
import pytest

from jaxserve.core import errors
from jaxserve.server.status import MAX_MESSAGE_CHARS, STATUS_CODES, status_of

ALL = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]


@pytest.mark.parametrize("error", ALL)
def test_every_error_class_is_listed(error: type[errors.JaxserveError]) -> None:
    assert error in STATUS_CODES


def test_the_statuses_of_the_protocol() -> None:
    codes = grpc.StatusCode
    assert status_of(errors.InvalidRequest("no"))[0] is codes.INVALID_ARGUMENT
    assert status_of(errors.ModelNotFound("no"))[0] is codes.NOT_FOUND
    assert status_of(errors.QueueFull("no"))[0] is codes.RESOURCE_EXHAUSTED
    assert status_of(errors.Draining("no"))[0] is codes.UNAVAILABLE


def test_a_subclass_takes_its_base_class_status() -> None:
    class Worse(errors.QueueFull):
        pass

    assert status_of(Worse("full")) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "full")


def test_a_huge_message_is_cut() -> None:
    assert len(status_of(errors.InvalidRequest("x" * 10**6))[1]) == MAX_MESSAGE_CHARS
