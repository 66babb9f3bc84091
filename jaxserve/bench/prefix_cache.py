"""What the prefix cache saves where many requests share a system prompt.

Requests that begin with the same system prompt and go on differently, all given at once (or at a
rate), with the prefix cache and without, the sides in turns. Every round has a system prompt of
its own, so that each side finds nothing cached when a round begins. See `chat_sessions` for long
conversations and the tiers below the device.

Figures:

* TTFT: from when a request is due to its first token, waiting for others included.
* prefill tokens: prompt tokens computed, of those offered.
* tokens/s: prompt tokens offered and tokens answered, per second from the first request to the
  last token.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxserve.bench.load import arrival_times
from jaxserve.bench.sides import (
    BuildEngine,
    MakeDriver,
    count_differing,
    identity,
    in_turns,
    prefill_figures,
    require_positive,
    token_source,
)
from jaxserve.bench.stepping import Driver, SteppedRecord, TimedRequest, greedy
from jaxserve.bench.tables import format_table
from jaxserve.bench.workloads import WorkloadItem
from jaxserve.core.config import EngineConfig

NO_CACHE, CACHE = "no cache", "cache"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedSpec:
    """Part `shared`: lengths in tokens; `request_rate` per second, None for all at once.

    Raises:
        ConfigError: a count is below 1.
    """

    num_requests: int = 32
    prefix_len: int = 512
    suffix_len: int = 32
    output_len: int = 32
    request_rate: float | None = None
    rounds: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self)

    @property
    def request_len(self) -> int:
        """Tokens of one request, in and out."""
        return self.prefix_len + self.suffix_len + self.output_len


def measure_shared(
    config: EngineConfig,
    spec: SharedSpec,
    *,
    build: BuildEngine,
    driver: MakeDriver = Driver,
    progress: bool = False,
) -> dict[str, Any]:
    """Run part `shared`, the sides in turns.

    Args:
        config: the engine's options; pool, context and prefix cache are set here, and there
            are no tiers below the device.
        spec: what to send.
        build: makes an engine.
        driver: steps it.
        progress: show progress bars.

    Returns:
        `sides` by name, `ttft_reduction`, `speedup` (of throughput) and `differing_answers`.
    """
    pages = -(-spec.request_len // config.page_size)
    config = dataclasses.replace(
        config,
        num_pages=spec.num_requests * (pages + 1),
        max_model_len=spec.request_len,
        host_cache_memory=0.0,
        disk_cache_memory=0.0,
        max_waiting=max(config.max_waiting, spec.num_requests),
    )
    sides = {
        name: driver(build(dataclasses.replace(config, prefix_cache=name == CACHE)))
        for name in (NO_CACHE, CACHE)
    }
    records: dict[str, list[SteppedRecord]] = {name: [] for name in sides}
    seconds = dict.fromkeys(sides, 0.0)
    for side in sides.values():  # whatever is slow the first time
        side.run(_shared_requests(side, dataclasses.replace(spec, num_requests=1), -1))
    for number in range(spec.rounds):
        for name in in_turns([*sides], number):
            requests = _shared_requests(sides[name], spec, number)
            bar = f"{name}, round {number + 1}" if progress else None
            result = sides[name].run(requests, progress=bar)
            records[name] += result.records
            seconds[name] += result.duration
    figures = {name: _shared_figures(records[name], seconds[name]) for name in sides}
    old, new = figures[NO_CACHE], figures[CACHE]
    return {
        "sides": figures,
        "ttft_reduction": 1 - new["mean_ttft"] / old["mean_ttft"],
        "speedup": new["token_throughput"] / old["token_throughput"],
        "num_answers": len(records[CACHE]),
        "differing_answers": count_differing(records[NO_CACHE], records[CACHE]),
    }


def _shared_requests(driver: Driver, spec: SharedSpec, number: int) -> list[TimedRequest]:
    source = token_source(driver)
    rng = np.random.default_rng([spec.seed, number + 1])
    prefix = source.draw(rng, spec.prefix_len)
    rate = float("inf") if spec.request_rate is None else spec.request_rate
    start = driver.now()
    suffixes = [source.draw(rng, spec.suffix_len) for _ in range(spec.num_requests)]
    items = [WorkloadItem(None, np.concatenate([prefix, s]), spec.output_len) for s in suffixes]
    times = arrival_times(items, rate, seed=spec.seed)
    return [
        TimedRequest(
            request_id=f"round{number}-{i}",
            prompt_token_ids=item.prompt_token_ids.tolist(),
            params=greedy(item.output_len),
            arrival=start + float(time),
        )
        for i, (item, time) in enumerate(zip(items, times, strict=True))
    ]


def _shared_figures(records: Sequence[SteppedRecord], seconds: float) -> dict[str, float]:
    figures = prefill_figures(records)
    answered = sum(r.output_len for r in records)
    return {
        **figures,
        "seconds": seconds,
        "token_throughput": (figures["prefill_tokens_offered"] + answered) / seconds,
        "output_throughput": answered / seconds,
    }


def format_shared(result: dict[str, Any], spec: SharedSpec) -> str:
    """Part `shared` as a table."""
    rows = [
        (
            name,
            f"{1000 * side['mean_ttft']:.0f}",
            f"{1000 * side['p99_ttft']:.0f}",
            f"{side['token_throughput']:.1f}",
            f"{side['output_throughput']:.1f}",
            f"{side['prefill_tokens_computed']} of {side['prefill_tokens_offered']}",
        )
        for name, side in result["sides"].items()
    ]
    header = (
        "shared prompt", "mean TTFT ms", "p99 TTFT ms", "tokens/s", "output tokens/s",
        "prefill tokens computed",
    )  # fmt: skip
    at = "all at once" if spec.request_rate is None else f"{spec.request_rate:g} per second"
    return (
        f"{spec.num_requests} requests, {at}, a system prompt of {spec.prefix_len} tokens, "
        f"{spec.suffix_len} of their own, {spec.output_len} answered; {spec.rounds} rounds\n"
        f"{format_table(header, rows)}\n"
        f"TTFT down {result['ttft_reduction']:.0%}, throughput {result['speedup']:.2f}x; "
        f"{identity(result['differing_answers'], result['num_answers'])}"
    )
