"""How many KV pages there are: from options, weights, and what devices and host have."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.engine.host_memory import MemoryLimit, available_memory, host_memory_limit
from jaxserve.models.config import ModelConfig
from jaxserve.models.kv_bytes import page_bytes as kv_page_bytes
from jaxserve.parallel.mesh import ShardingRules, bytes_per_device

log = logging.getLogger(__name__)

GIB = 2**30
CPU_KV_GIB = 2.0
FREE_MEMORY_SHARE = 0.9  # of what a device has left once the weights are there
HOST_RESERVE = 2**29  # bytes for Python, programs and their temporaries


def num_pages(
    config: EngineConfig,
    model: ModelConfig,
    rules: ShardingRules,
    kv_dtype: np.dtype,
    max_model_len: int,
    params: Mapping[str, Any],
) -> int:
    """Pages of the KV pool, over all data shards.

    Args:
        config: the engine's options.
        model: fitted to the mesh.
        rules: the mesh.
        kv_dtype: of the values in the pool.
        max_model_len: in tokens; more pages than all requests could take are not made.
        params: shapes and placements of the weights, see `models.weights`.

    Raises:
        ConfigError: pool and weights do not fit what the devices or the host have.
    """
    page_bytes = kv_page_bytes(model, rules, kv_dtype, config.page_size)
    room = _Room(config, rules, bytes_per_device(params))
    if config.num_pages is not None:
        room.check(config.num_pages // rules.data * page_bytes, f"--num-pages {config.num_pages}")
        return config.num_pages
    if config.kv_cache_memory is not None:
        wanted = config.kv_cache_memory * GIB
        room.check(wanted, f"--kv-cache-memory {config.kv_cache_memory:g}")
    else:
        wanted = room.by_default()
    # More could never be used.
    most = config.max_num_seqs // rules.data * -(-max_model_len // config.page_size)
    per_shard = min(int(wanted // page_bytes), most)
    if per_shard < 1:
        raise ConfigError(
            f"a KV page takes {page_bytes} bytes per device and there is room for none; raise "
            "--kv-cache-memory, shrink --page-size or split over more --mesh tensor shards"
        )
    return per_shard * rules.data


def longest_request(config: EngineConfig, max_model_len: int, pages_per_shard: int) -> int:
    """The longest prompt plus answer, in tokens: one that the whole pool cannot hold is none.

    Args:
        config: the engine's options.
        max_model_len: as the options and the model have it.
        pages_per_shard: of the pool.

    Raises:
        ConfigError: the options ask for a length that the pool cannot hold.
    """
    fits = pages_per_shard * config.page_size
    if fits >= max_model_len:
        return max_model_len
    pool = f"the KV cache holds {fits} tokens ({pages_per_shard} pages of {config.page_size})"
    if config.max_model_len is not None:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} does not fit: {pool}; lower it, or raise "
            "--kv-cache-memory or --num-pages"
        )
    log.warning(
        "requests may have %d tokens at most, instead of %d: %s; --kv-cache-memory or --num-pages "
        "make it larger", fits, max_model_len, pool,
    )  # fmt: skip
    return fits


@contextlib.contextmanager
def out_of_memory(what: str) -> Iterator[None]:
    """Turn a failed allocation into a message.

    Raises:
        ConfigError: there was no memory for `what`.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = (str(error).splitlines() or ["out of memory"])[0]
        raise ConfigError(
            f"no memory for {what}: {reason}. A smaller --kv-cache-memory or model, or more "
            "--mesh tensor shards, take less"
        ) from error


class _Room:
    """What there is for a KV pool on each device of a mesh."""

    def __init__(self, config: EngineConfig, rules: ShardingRules, weights: int) -> None:
        self._weights = weights
        self._tiers = config.host_cache_memory * GIB
        self._devices = rules.mesh.devices.size
        device = rules.mesh.devices.flat[0]
        stats = device.memory_stats() or {}
        self._free = None  # on an accelerator, before the weights
        if "bytes_limit" in stats:
            self._free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
        self._is_host = device.platform == "cpu"
        self._host = host_memory_limit()

    def by_default(self) -> float:
        """Bytes for the pool on each device, if no option says."""
        if self._free is not None:
            self.check(0, "the model")
            return (self._free - self._weights) * FREE_MEMORY_SHARE
        wanted = CPU_KV_GIB * GIB
        if not self._is_host or self._host is None:
            return wanted
        self.check(0, "the model")
        left = (self._host.bytes - self._host_need(0)) / self._devices * FREE_MEMORY_SHARE
        if left < wanted:
            log.warning(
                "%.2f GiB of KV cache instead of %g: %s is %.1f GiB", left / GIB, CPU_KV_GIB,
                self._host.what, self._host.bytes / GIB,
            )  # fmt: skip
        return min(wanted, left)

    def check(self, pool: float, asked: str) -> None:
        """Refuse what cannot fit, and warn of what does not fit now.

        Args:
            pool: bytes on each device.
            asked: the option, for messages.
        """
        parts = f"{pool / GIB:.2f} GiB of KV cache and {self._weights / GIB:.2f} GiB of weights"
        if self._free is not None and self._weights + pool > self._free:
            raise ConfigError(
                f"{asked} does not fit: {parts} per device, where {self._free / GIB:.2f} GiB are "
                "free; make it smaller, or split over more --mesh tensor shards"
            )
        need, host = self._host_need(pool), self._host
        if host is None:
            return
        if need > host.bytes:
            raise ConfigError(f"{asked} does not fit: {self._on_host(parts, need, host)}")
        available = available_memory()
        if available is not None and need > available:
            now = MemoryLimit(available, "what is free of the machine's memory now")
            log.warning("%s may not fit: %s", asked, self._on_host(parts, need, now))

    def _host_need(self, pool: float) -> float:
        on_host = (self._weights + pool) * self._devices if self._is_host else 0
        return on_host + self._tiers + HOST_RESERVE

    def _on_host(self, parts: str, need: float, limit: MemoryLimit) -> str:
        if self._is_host and self._devices > 1:
            parts += f" on each of {self._devices} CPU devices"
        text = f"{parts}, " if self._is_host else ""
        if self._tiers:
            text += f"{self._tiers / GIB:g} GiB of --host-cache-memory, "
        return (
            f"{text}with {HOST_RESERVE / GIB:g} GiB for the rest {need / GIB:.2f} GiB, and "
            f"{limit.what} is {limit.bytes / GIB:.2f} GiB"
        )
