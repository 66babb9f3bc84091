"""Who is calling: set once per call by whatever checked the API key, read where it matters."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

from jaxserve.core.errors import PermissionDenied
from jaxserve.core.service_params import ServiceParams


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who a call comes from.

    Attributes:
        tenant: on whose account it is served; empty if nobody had to say who they are.
        is_authenticated: whether an API key said so.
    """

    tenant: str = ""
    is_authenticated: bool = False


_current: contextvars.ContextVar[Caller] = contextvars.ContextVar("caller", default=Caller())  # noqa: B039 - it is frozen


def current_caller() -> Caller:
    """Who the call that runs in this context comes from."""
    return _current.get()


def set_caller(caller: Caller) -> None:
    """Make somebody the caller of the rest of this task, which is one call's."""
    _current.set(caller)


@contextlib.contextmanager
def calling(caller: Caller) -> Iterator[None]:
    """Make somebody the caller of what runs inside."""
    token = _current.set(caller)
    try:
        yield
    finally:
        _current.reset(token)


def on_account(service: ServiceParams) -> ServiceParams:
    """The request's service parameters, with the tenant that the caller's API key names.

    Raises:
        PermissionDenied: the request names another tenant.
    """
    caller = current_caller()
    if not caller.is_authenticated:
        return service
    if service.tenant not in ("", caller.tenant):
        raise PermissionDenied(f"the API key is not that of tenant {service.tenant!r}")
    return dataclasses.replace(service, tenant=caller.tenant)


def own_requests_only() -> str | None:
    """The tenant whose requests alone the caller may see or stop; None if they may all of them."""
    caller = current_caller()
    return caller.tenant if caller.is_authenticated else None
