"""From options to the host's side of an engine: policy, caches, predictor, scheduler."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxserve.cache.disk_tier import DiskTier
from jaxserve.cache.events import EventLog
from jaxserve.cache.page_pool import PagePool
from jaxserve.cache.page_store import PageStore
from jaxserve.checkpoints.gguf_file import parts_of
from jaxserve.core.config import EngineConfig, parse_tenant_weights
from jaxserve.core.errors import ConfigError
from jaxserve.files.cache_home import cache_home
from jaxserve.prediction import make_predictor
from jaxserve.prediction.base import LengthPredictor
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.program_cache import ProgramCache
from jaxserve.scheduling.policies import Policy, PolicySettings, make_policy
from jaxserve.scheduling.preemption import Costs
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.scheduling.settings import SchedulerSettings
from jaxserve.scheduling.token_budget import TokenBudget, TpotBudget

GIB = 2**30


class Rates(NamedTuple):
    """What a kind of device is taken to do until it is seen: FLOP/s, and bytes/s to the host."""

    flops: float
    bytes: float


RATES = {"cpu": Rates(2e11, 5e9), "gpu": Rates(3e14, 2e10), "tpu": Rates(1e14, 1e10)}


def model_fingerprint(model: Path | None, config: EngineConfig) -> str:
    """What must be equal for KV pages and learned lengths of an earlier start to be of use.

    Args:
        model: the model's file or directory; None for random weights.
        config: the engine's options.
    """
    if model is None:
        facts = [f"{config.model} {config.seed}"]
    else:
        files = sorted(model.rglob("*")) if model.is_dir() else parts_of(model)
        stats = [(file, file.stat()) for file in files if file.is_file()]
        facts = [f"{file.name} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats]
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=16).hexdigest()


def build_store(
    config: EngineConfig, lowering: StepLowering, fingerprint: str, events: EventLog
) -> PageStore | None:
    """Host memory and disk for KV pages, as the options say; None for neither.

    Raises:
        ConfigError: the sizes hold no page, or the directory cannot be used.
    """
    host, disk = int(config.host_cache_memory * GIB), int(config.disk_cache_memory * GIB)
    if not host and not disk:
        return None
    shape = lowering.page_shape
    tier = None
    if disk:
        directory = Path(config.disk_cache_dir) if config.disk_cache_dir else cache_home("kv")
        # What computed the values counts too: rounded to one type, they differ by their origin.
        dtypes = f"{lowering.kv_dtype.name} of {lowering.dtype.name}"
        facts = f"{fingerprint} {shape} {dtypes}"
        tier = DiskTier(directory, _stored_page_bytes(lowering), facts, disk)
    return PageStore(shape, lowering.page_dtype, host_bytes=host, disk=tier, events=events)


def build_predictor(
    config: EngineConfig,
    params: Mapping[str, jax.Array],
    hidden_size: int,
    max_model_len: int,
    fingerprint: str,
    cache: ProgramCache,
) -> LengthPredictor:
    """The length predictor that the options name; its programs come from the cache, too."""
    directory = config.predictor_dir or cache_home("predictors")
    return make_predictor(
        config.length_predictor,
        embed=_embedder(params["embed"]) if config.length_predictor != "none" else None,
        hidden_size=hidden_size,
        max_tokens=max_model_len,
        directory=Path(directory),
        fingerprint=fingerprint,
        # The cache keeps programs of the default backend; a predictor learns on the CPU.
        compile=cache.get if jax.default_backend() == "cpu" else None,
    )


def _embedder(table: jax.Array) -> Callable[[Sequence[int]], np.ndarray]:
    rows = np.asarray(table)  # on CPU no copy

    def embed(token_ids: Sequence[int]) -> np.ndarray:
        """float32 [tokens, hidden]."""
        return rows[np.asarray(token_ids)].astype(np.float32)

    return embed


def build_scheduler(
    config: EngineConfig,
    lowering: StepLowering,
    max_model_len: int,
    *,
    policy: Policy,
    store: PageStore | None,
    events: EventLog,
    predictor: LengthPredictor,
) -> Scheduler:
    """The scheduler of a runner with these programs."""
    shards = lowering.rules.data
    pools = [
        PagePool(
            lowering.pages_per_shard,
            prefix_cache=config.prefix_cache,
            events=events,
            shard=shard,
        )
        for shard in range(shards)
    ]
    return Scheduler(
        page_pools=pools,
        page_size=config.page_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        max_waiting=config.max_waiting,
        policy=policy,
        store=store,
        settings=SchedulerSettings(
            prefix_cache=config.prefix_cache,
            starvation_timeout=config.starvation_timeout,
            admission=config.admission,
            preemption=config.preemption,
            prefill_first=config.prefill_first,
            slice_tokens=config.slice_tokens,
            token_budget=_token_budget(config, lowering.program.buckets, shards),
            probe_every=predictor.probe_every,
            costs=_costs(lowering),
        ),
    )


def build_policy(config: EngineConfig) -> Policy:
    """The policy that the options name.

    Raises:
        ConfigError: it goes by predicted lengths, and there is no predictor.
    """
    settings = PolicySettings(
        page_size=config.page_size,
        ttft_target=config.slo_ttft_ms / 1000,
        tpot_target=config.slo_tpot_ms / 1000,
        shed_late=config.shed_late,
        tenant_weights=parse_tenant_weights(config.tenant_weights),
    )
    policy = make_policy(config.policy, settings)
    if policy.traits.wants_predictions and config.length_predictor == "none":
        raise ConfigError(
            f"policy {config.policy} goes by predicted lengths: name a --length-predictor"
        )
    return policy


def _token_budget(config: EngineConfig, buckets: Buckets, shards: int) -> TokenBudget | None:
    if config.token_budget == "fixed":
        return None
    return TpotBudget(config.slo_tpot_ms / 1000, [size * shards for size in buckets.tokens])


def _stored_page_bytes(lowering: StepLowering) -> int:
    """What a page takes off the device, with the heads of all devices."""
    return math.prod(lowering.page_shape) * lowering.kv_dtype.itemsize


def _costs(lowering: StepLowering) -> Costs:
    rates = RATES.get(lowering.rules.mesh.devices.flat[0].platform, RATES["gpu"])
    num_weights = sum(math.prod(p.shape) for p in lowering.params.values())
    num_devices = lowering.rules.mesh.devices.size
    return Costs(
        seconds_per_token=2 * num_weights / (rates.flops * num_devices),
        page_bytes=_stored_page_bytes(lowering),
        bytes_per_second=rates.bytes,
    )
