"""What the command line says of security, and what a server needs of its process for it."""

import contextlib
import dataclasses
import logging
import resource
import sys
from pathlib import Path

from jaxserve.core.errors import ConfigError
from jaxserve.core.options import check_number
from jaxserve.server.limits import RequestLimits
from jaxserve.server.security.keys import ApiKeys
from jaxserve.server.security.tenants import TenantLimits

log = logging.getLogger(__name__)

OTHER_FILES = 64  # weights, caches, logs, sockets of the process itself, clients being refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecurityOptions:
    """Who may call, and how much they may ask for.

    Attributes:
        limits: on single requests.
        api_keys: file of API keys; None lets everybody call.
        tenant_limits: of tenants for whom that file names none.
        admin_port: port of the admin surface, on the loopback interface; None for none.

    Raises:
        ConfigError: options contradict each other.
    """

    limits: RequestLimits = dataclasses.field(default_factory=RequestLimits)
    api_keys: Path | None = None
    tenant_limits: TenantLimits = dataclasses.field(default_factory=TenantLimits)
    admin_port: int | None = None

    def __post_init__(self) -> None:
        if self.tenant_limits.any and self.api_keys is None:
            raise ConfigError(
                "limits of tenants need --api-keys: without keys anybody could be anyone"
            )
        if self.admin_port is not None:
            check_number("admin_port", self.admin_port, "[0, 65535]")

    def load_keys(self) -> ApiKeys | None:
        """The API keys, if there is a file of them.

        Raises:
            ConfigError: the file is wrong.
        """
        return None if self.api_keys is None else ApiKeys(self.api_keys, self.tenant_limits)


def allow_many_files() -> int:
    """Let this process have as many files open as its user may give it; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # then fewer connections it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def connections_within(max_connections: int, num_ports: int) -> int:
    """Connections to each of some ports for which there are files, `max_connections` at most.

    Without this a process that has none left can neither take nor refuse anybody. Says so in the
    log if they are fewer.
    """
    files = allow_many_files()
    room = max(1, (files - OTHER_FILES) // max(num_ports, 1))
    if room < max_connections:
        log.warning(
            "this process may have %d files open (ulimit -n): --max-connections is %d, not %d",
            files,
            room,
            max_connections,
        )
    return min(room, max_connections)
