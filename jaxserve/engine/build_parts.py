"""From options to what stands beside an engine's scheduler: caches, predictor, costs."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxserve.cache.disk_tier import DiskTier
from jaxserve.cache.events import EventLog
from jaxserve.cache.page_store import PageStore
from jaxserve.checkpoints.gguf_file import parts_of
from jaxserve.core.config import EngineConfig
from jaxserve.files.cache_home import cache_home
from jaxserve.models.graph import Params
from jaxserve.models.weights import Weight, dense
from jaxserve.prediction import make_predictor
from jaxserve.prediction.base import LengthPredictor
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.program_cache import ProgramCache
from jaxserve.scheduling.preemption import Costs

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
    facts.append(f"{config.quantization} {config.activation_dtype}")
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
    layout = lowering.page_layout
    tier = None
    if disk:
        directory = Path(config.disk_cache_dir) if config.disk_cache_dir else cache_home("kv")
        # What computed the values counts too: rounded to one type, they differ by their origin.
        dtypes = f"{lowering.kv_dtype.name} of {lowering.dtype.name}"
        rotation = lowering.program.graph.config.rope_scaling  # may depend on --max-model-len
        facts = f"{fingerprint} {lowering.page_shape} {dtypes} {rotation}"
        tier = DiskTier(directory, layout.num_bytes, facts, disk)
    return PageStore(layout.shape, layout.dtype, host_bytes=host, disk=tier, events=events)


def build_predictor(
    config: EngineConfig,
    params: Params,
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


def _embedder(table: Weight) -> Callable[[Sequence[int]], np.ndarray]:
    table = jax.tree.map(np.asarray, table)  # on CPU no copy

    def embed(token_ids: Sequence[int]) -> np.ndarray:
        """float32 [tokens, hidden]."""
        rows = jax.tree.map(lambda array: array[np.asarray(token_ids)], table)
        return dense(rows).astype(np.float32)

    return embed


def estimate_costs(lowering: StepLowering) -> Costs:
    """What moving and computing KV again cost, by the kind of device."""
    rates = RATES.get(lowering.rules.mesh.devices.flat[0].platform, RATES["gpu"])
    num_weights = sum(p.size for p in lowering.program.graph.parameters.values())
    num_devices = lowering.rules.mesh.devices.size
    return Costs(
        seconds_per_token=2 * num_weights / (rates.flops * num_devices),
        page_bytes=lowering.page_layout.num_bytes,
        bytes_per_second=rates.bytes,
    )
