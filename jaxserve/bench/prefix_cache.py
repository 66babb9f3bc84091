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
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxserve.bench.chat_sessions import ChatResult, measure_chat
from jaxserve.bench.load import arrival_times
from jaxserve.bench.settings import ChatSpec, PrefixCacheSpec, SharedSpec
from jaxserve.bench.sides import (
    PrefillFigures,
    Sides,
    differing_answers,
    identity,
    prefill_figures,
    token_source,
)
from jaxserve.bench.stepping import Driver, RunResult, SteppedRecord, TimedRequest, greedy
from jaxserve.bench.tables import Result, tabulate
from jaxserve.bench.workloads import WorkloadItem
from jaxserve.core.config import EngineConfig

NO_CACHE, CACHE = "no cache", "cache"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedFigures(PrefillFigures):
    """One side's figures over all rounds; see the module."""

    seconds: float
    token_throughput: float
    output_throughput: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedResult(Result):
    """Part `shared`: both sides, what TTFT loses and throughput gains, and whether they agree."""

    spec: SharedSpec
    sides: dict[str, SharedFigures]
    ttft_reduction: float
    speedup: float
    num_answers: int
    differing_answers: int

    def __str__(self) -> str:
        spec = self.spec
        table = tabulate("shared prompt", self.sides, {
            "mean TTFT ms": lambda side: f"{1000 * side.mean_ttft:.0f}",
            "p99 TTFT ms": lambda side: f"{1000 * side.p99_ttft:.0f}",
            "tokens/s": lambda side: f"{side.token_throughput:.1f}",
            "output tokens/s": lambda side: f"{side.output_throughput:.1f}",
            "prefill tokens computed": PrefillFigures.computed,
        })  # fmt: skip
        at = "all at once" if spec.request_rate is None else f"{spec.request_rate:g} per second"
        return (
            f"{spec.num_requests} requests, {at}, a system prompt of {spec.prefix_len} tokens, "
            f"{spec.suffix_len} of their own, {spec.output_len} answered; {spec.rounds} rounds\n"
            f"{table}\n"
            f"TTFT down {self.ttft_reduction:.0%}, throughput {self.speedup:.2f}x; "
            f"{identity(self.differing_answers, self.num_answers)}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixCacheResult(Result):
    """Both parts; None for one that was not run."""

    shared: SharedResult | None = None
    chat: ChatResult | None = None

    def __str__(self) -> str:
        return "\n\n".join(str(part) for part in (self.shared, self.chat) if part is not None)


def measure_prefix_cache(
    config: EngineConfig, spec: PrefixCacheSpec, shared: SharedSpec, chat: ChatSpec, sides: Sides
) -> PrefixCacheResult:
    """Run the parts that are wanted; the disk tier of part `chat` is gone in the end."""
    result = PrefixCacheResult()
    if "shared" in spec.parts:
        result = dataclasses.replace(result, shared=measure_shared(config, shared, sides))
    if "chat" in spec.parts:
        if config.disk_cache_dir is not None:
            Path(config.disk_cache_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=config.disk_cache_dir, prefix="jaxserve-kv-") as disk:
            result = dataclasses.replace(result, chat=measure_chat(config, chat, Path(disk), sides))
    return result


def measure_shared(config: EngineConfig, spec: SharedSpec, sides: Sides) -> SharedResult:
    """Run part `shared`, the sides in turns.

    Args:
        config: the engine's options; pool, context and prefix cache are set here, and there
            are no tiers below the device.
        spec: what to send.
        sides: runs the engines.
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
    drivers = sides.open({
        name: dataclasses.replace(config, prefix_cache=name == CACHE) for name in (NO_CACHE, CACHE)
    })  # fmt: skip
    for driver in drivers.values():  # whatever is slow the first time
        driver.run(_shared_requests(driver, dataclasses.replace(spec, num_requests=1), -1))

    def run(name: str, number: int) -> RunResult:
        return drivers[name].run(_shared_requests(drivers[name], spec, number))

    runs = sides.take_turns([*drivers], spec.rounds, run)
    records = {name: [r for result in mine for r in result.records] for name, mine in runs.items()}
    figures = {
        name: _shared_figures(records[name], sum(result.duration for result in mine))
        for name, mine in runs.items()
    }
    old, new = figures[NO_CACHE], figures[CACHE]
    answers = {name: [r.token_ids for r in mine] for name, mine in records.items()}
    return SharedResult(
        spec=spec,
        sides=figures,
        ttft_reduction=1 - new.mean_ttft / old.mean_ttft,
        speedup=new.token_throughput / old.token_throughput,
        num_answers=len(records[CACHE]),
        differing_answers=sum(differing_answers(answers).values()),
    )


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


def _shared_figures(records: Sequence[SteppedRecord], seconds: float) -> SharedFigures:
    figures = prefill_figures(records)
    answered = sum(r.output_len for r in records)
    return SharedFigures(
        **vars(figures),
        seconds=seconds,
        token_throughput=(figures.prefill_tokens_offered + answered) / seconds,
        output_throughput=answered / seconds,
    )
