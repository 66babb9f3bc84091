"""Scheduling policies by name. A new one is one file and one line here."""

from collections.abc import Callable

from jaxserve.core.errors import ConfigError
from jaxserve.scheduling.policies.base import Policy, Priority
from jaxserve.scheduling.policies.fcfs import FirstComeFirstServed

POLICIES: dict[str, Callable[[], Policy]] = {
    "fcfs": FirstComeFirstServed,
}


def make_policy(name: str) -> Policy:
    """Build the policy of that name.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}; known: {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()


__all__ = ["POLICIES", "Policy", "Priority", "make_policy"]
