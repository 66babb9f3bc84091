"""What a scheduling policy is."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence

from jaxserve.core.request import Request

Priority = float | tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """What the options say to policies; each takes what concerns it.

    Attributes:
        page_size: tokens per KV page.
        ttft_target, tpot_target: seconds, of requests that bring none of their own.
        shed_overdue: whether requests that cannot meet their targets any more may be given up.
        tenant_weights: each tenant's share; tenants not named have 1.
    """

    page_size: int = 64
    ttft_target: float = 10.0
    tpot_target: float = 1.0
    shed_overdue: bool = False
    tenant_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Traits:
    """What the mechanism must know of a policy beforehand: what it asks it, and when.

    Attributes:
        ages: requests without progress for longer than the starvation timeout go before all
            others, by arrival, until they are finished. False for an order in which none can
            starve anyway.
        reranks: the priority of a running request changes while it runs, and is asked for at
            every step.
        refreshes: the priority of a waiting request changes while it waits; a few are asked for
            at every step, in turn.
        wants_predictions: refuses to run without a length predictor.
        has_groups: `group` and `group_priority` come before `priority`.
        displaces: `displaces` is asked; otherwise, running requests come first.
        sheds: `sheds` is asked.
        counts_service: `served` is told of every step.
    """

    ages: bool = True
    reranks: bool = False
    refreshes: bool = False
    wants_predictions: bool = False
    has_groups: bool = False
    displaces: bool = False
    sheds: bool = False
    counts_service: bool = False


# Methods that are only called if that trait says so.
_TRAIT_OF = {
    "group": "has_groups",
    "group_priority": "has_groups",
    "group_priorities": "has_groups",
    "displaces": "displaces",
    "sheds": "sheds",
    "served": "counts_service",
}


class Policy(ABC):
    """Decides who goes first. Only `priority` must be said; the rest has a plain default.

    The same order serves three times: the smallest priority is admitted first and prefilled
    first, and the largest is the first to lose its pages when they run out. A policy keeps books
    of its own if it must (by `Request.key`), but no clock: time comes as an argument.

    Attributes:
        traits: of the class, all that its methods can do; of an instance, no more than that.
    """

    traits: Traits = Traits()

    def __init_subclass__(cls) -> None:
        """Refuse a method that would never be called.

        Raises:
            TypeError: the class has one, and its traits do not say so.
        """
        for method, trait in _TRAIT_OF.items():
            is_own = getattr(cls, method) is not getattr(Policy, method)
            if is_own and not getattr(cls.traits, trait):
                raise TypeError(f"{cls.__name__} has `{method}`, but its traits not `{trait}`")

    @abstractmethod
    def priority(self, request: Request, now: float) -> Priority:
        """Rank of a request: smaller is served first, ties go to the older request.

        Asked each time a request joins the waiting queue, when a predictor has changed its mind
        about it, and as the traits `reranks` and `refreshes` say. With linear ageing the order of
        two waiting requests never changes, so that needs neither.

        Args:
            request: waiting or running.
            now: seconds.
        """

    def group(self, request: Request) -> Hashable:
        """The request's group; within one, requests keep their order while they wait."""
        return None

    def group_priority(self, group: Hashable, now: float) -> float:
        """Rank of a group, which comes before `priority`.

        May change at any time, but while requests of a group wait it must never fall.
        """
        return 0.0

    def displaces(self, newcomer: Request, running: Request, now: float) -> bool:
        """Whether a waiting request may take the place of a running one that ranks after it."""
        return False

    def sheds(self, request: Request, now: float) -> bool:
        """Whether a waiting request without a token yet is given up. Asked of the first in line."""
        return False

    def arrived(self, request: Request, now: float) -> None:  # noqa: B027
        """A new request is about to be ranked for the first time."""

    def preempted(self, request: Request, now: float) -> None:  # noqa: B027
        """A running request lost its place, and is about to be ranked among those that wait."""

    def priorities(self, requests: Sequence[Request], now: float) -> Sequence[Priority]:
        """`priority` of each request, in their order: hundreds, at every step, if it `reranks`."""
        return [self.priority(request, now) for request in requests]

    def group_priorities(self, requests: Sequence[Request], now: float) -> Sequence[float]:
        """`group_priority` of every request's group, in the requests' order."""
        groups = [self.group(request) for request in requests]
        ranks = {group: self.group_priority(group, now) for group in dict.fromkeys(groups)}
        return [ranks[group] for group in groups]

    def served(self, served: Sequence[tuple[Request, int]], now: float) -> None:  # noqa: B027
        """A step was planned that computes so many tokens of each of these requests.

        At this time `Request.num_computed_tokens` counts them already, and
        `Request.num_pending_tokens` the token that the step will sample, if it does.
        """

    def finished(self, request: Request) -> None:  # noqa: B027
        """A request ended, in any way; forget what was kept of it."""
