"""Scheduling policies by name. A new one is one file and one line here."""

from collections.abc import Callable

from jaxserve.core.errors import ConfigError
from jaxserve.scheduling.policies.base import Policy, PolicySettings, Priority
from jaxserve.scheduling.policies.fcfs import FirstComeFirstServed

POLICIES: dict[str, Callable[[PolicySettings], Policy]] = {
    "fcfs": lambda settings: FirstComeFirstServed(),
}


def make_policy(name: str, settings: PolicySettings | None = None) -> Policy:
    """Build the policy of that name.

    Args:
        name: one of POLICIES.
        settings: what policies may be told; default `PolicySettings()`.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}; known: {', '.join(sorted(POLICIES))}")
    return POLICIES[name](settings or PolicySettings())


__all__ = ["POLICIES", "Policy", "PolicySettings", "Priority", "make_policy"]
