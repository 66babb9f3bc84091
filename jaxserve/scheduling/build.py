"""From options to a scheduler, for any device: one place that puts it together."""

from collections.abc import Sequence

from jaxserve.cache.events import EventLog
from jaxserve.cache.page_pool import PagePool
from jaxserve.core.config import EngineConfig, parse_tenant_weights
from jaxserve.core.errors import ConfigError
from jaxserve.scheduling.page_traffic import Store
from jaxserve.scheduling.policies import Policy, PolicySettings, make_policy
from jaxserve.scheduling.preemption import Costs
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.scheduling.settings import SchedulerSettings
from jaxserve.scheduling.token_budget import TpotBudget


def build_policy(config: EngineConfig) -> Policy:
    """The policy that the options name.

    Raises:
        ConfigError: it goes by predicted lengths, and there is no predictor.
    """
    settings = PolicySettings(
        page_size=config.page_size,
        ttft_target=config.slo_ttft_ms / 1000,
        tpot_target=config.slo_tpot_ms / 1000,
        shed_overdue=config.shed_overdue,
        tenant_weights=parse_tenant_weights(config.tenant_weights),
    )
    policy = make_policy(config.policy, settings)
    if policy.traits.wants_predictions and config.length_predictor == "none":
        raise ConfigError(
            f"policy {config.policy} goes by predicted lengths: name a --length-predictor"
        )
    return policy


def build_scheduler(
    config: EngineConfig,
    *,
    step_sizes: Sequence[int],
    num_shards: int = 1,
    policy: Policy | None = None,
    store: Store | None = None,
    events: EventLog | None = None,
    probe_every: int = 0,
    costs: Costs | None = None,
) -> Scheduler:
    """The scheduler of an engine with these options; it holds no device, and may plan for none.

    Args:
        config: with `num_pages` and `max_model_len` known.
        step_sizes: the token counts that steps are padded to, over all shards, ascending.
        num_shards: data shards, each with its part of the pages.
        policy: the order of service, if not the one that the options name.
        store: where pages go that the device has no room for.
        events: what becomes of pages is told here.
        probe_every: see `SchedulerSettings`.
        costs: what swapping and recomputing are taken to cost.

    Raises:
        ConfigError: the options contradict each other, or cannot be split over the shards.
    """
    assert config.num_pages is not None and config.max_model_len is not None
    pools = [
        PagePool(
            config.num_pages // num_shards,
            prefix_cache=config.prefix_cache,
            events=events,
            shard=shard,
        )
        for shard in range(num_shards)
    ]
    tpot = config.token_budget == "tpot"
    return Scheduler(
        page_pools=pools,
        page_size=config.page_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        max_waiting=config.max_waiting,
        policy=policy or build_policy(config),
        store=store,
        settings=SchedulerSettings(
            prefix_cache=config.prefix_cache,
            starvation_timeout=config.starvation_timeout,
            admission=config.admission,
            preemption=config.preemption,
            prefill_first=config.prefill_first,
            slice_tokens=config.slice_tokens,
            token_budget=TpotBudget(config.slo_tpot_ms / 1000, step_sizes) if tpot else None,
            probe_every=probe_every,
            costs=costs or Costs(),
        ),
    )
