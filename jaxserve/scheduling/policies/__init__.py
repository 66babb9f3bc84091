"""Scheduling policies by name. A new one is one file and one line here."""

from collections.abc import Callable

from jaxserve.core.errors import ConfigError
from jaxserve.scheduling.policies.base import Policy, PolicySettings, Priority, Traits
from jaxserve.scheduling.policies.batch_prefix import BatchPrefix
from jaxserve.scheduling.policies.deadline import LeastSlack
from jaxserve.scheduling.policies.fcfs import FirstComeFirstServed
from jaxserve.scheduling.policies.lpm import LongestPrefixMatch
from jaxserve.scheduling.policies.ltr import LearnedRank
from jaxserve.scheduling.policies.mlfq import MultiLevelFeedbackQueue
from jaxserve.scheduling.policies.priority import ClientPriority
from jaxserve.scheduling.policies.sjf import ShortestJobFirst
from jaxserve.scheduling.policies.srtf import ShortestRemainingFirst
from jaxserve.scheduling.policies.vtc import VirtualTokenCounter

POLICIES: dict[str, Callable[[PolicySettings], Policy]] = {
    "fcfs": lambda settings: FirstComeFirstServed(),
    "priority": lambda settings: ClientPriority(),
    "sjf": lambda settings: ShortestJobFirst(),
    "srtf": lambda settings: ShortestRemainingFirst(),
    "mlfq": lambda settings: MultiLevelFeedbackQueue(),
    "deadline": LeastSlack,
    "ltr": lambda settings: LearnedRank(),
    "vtc": VirtualTokenCounter,
    "lpm": lambda settings: LongestPrefixMatch(),
    "batch-prefix": lambda settings: BatchPrefix(),
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


__all__ = ["POLICIES", "Policy", "PolicySettings", "Priority", "Traits", "make_policy"]
