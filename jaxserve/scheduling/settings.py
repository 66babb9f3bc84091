"""How the scheduler goes about its work, beside its policy and its limits."""

import dataclasses

from jaxserve.scheduling.preemption import Costs
from jaxserve.scheduling.token_budget import TokenBudget


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """Switches of the mechanism; `EngineConfig` explains those of the same name.

    Attributes:
        prefix_cache, starvation_timeout, admission, preemption, prefill_first, slice_tokens:
            as in `EngineConfig`.
        token_budget: says how large a step may be; default the fixed limit.
        probe_every: hidden states are wanted of every n-th answer token; 0: of none.
        costs: what the choice of `preemption` goes by.
    """

    prefix_cache: bool = True
    starvation_timeout: float = 60.0
    admission: str = "current"
    preemption: str = "auto"
    prefill_first: bool = False
    slice_tokens: int | None = None
    token_budget: TokenBudget | None = None
    probe_every: int = 0
    costs: Costs = dataclasses.field(default_factory=Costs)
