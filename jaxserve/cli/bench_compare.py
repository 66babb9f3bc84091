"""Commands of `jaxserve bench` that show what a technique buys: several sides in one run."""

import contextlib
import dataclasses
from typing import TYPE_CHECKING

from jaxserve.bench.settings import (
    ChatSpec,
    ChunkedPrefillSpec,
    FairnessSpec,
    GrammarSpec,
    PoliciesSpec,
    PredictorSpec,
    PrefixCacheSpec,
    SharedSpec,
)
from jaxserve.cli.benchmark import ALL, BATCH, MODEL, benchmark
from jaxserve.core.config import EngineConfig

if TYPE_CHECKING:
    from jaxserve.bench.tables import Result


@benchmark(
    (*BATCH, "kv_cache_dtype", "host_cache_memory", "disk_cache_memory", "disk_cache_dir"),
    # Small pages: what is shared is shared by the page.
    defaults={"host_cache_memory": 1.0, "disk_cache_memory": 1.0, "max_num_seqs": 32,
              "page_size": 16},
    spec=PrefixCacheSpec,
    shared=SharedSpec,
    chat=ChatSpec,
)  # fmt: skip
def prefix_cache(
    config: EngineConfig, spec: PrefixCacheSpec, shared: SharedSpec, chat: ChatSpec, progress: bool
) -> "Result":
    """TTFT, throughput and prefill tokens with cached KV pages and without.

    Part `shared`: requests that begin with the same system prompt. Part `chat`: sessions that
    take turns on a device with room for two of them, with host memory below it and, over a
    restart, a disk (kept in a new folder inside of --disk-cache-dir, and removed at the end).
    """
    from jaxserve.bench.prefix_cache import measure_prefix_cache
    from jaxserve.bench.sides import Sides

    return measure_prefix_cache(config, spec, shared, chat, Sides(progress=progress))


@benchmark((*MODEL, "kv_cache_dtype", "overlap"), spec=ChunkedPrefillSpec)
def chunked_prefill(config: EngineConfig, spec: ChunkedPrefillSpec, progress: bool) -> "Result":
    """Gaps between tokens of running streams when a long prompt arrives.

    Compares stall-free chunked prefill with several token budgets, with one that keeps steps
    within --tpot-ms, and with computing the whole prompt first.
    """
    from jaxserve.bench.chunked_prefill import measure_chunked_prefill
    from jaxserve.bench.sides import Sides

    return measure_chunked_prefill(config, spec, Sides(progress=progress))


@benchmark(BATCH, defaults={"max_num_seqs": 8, "max_num_batched_tokens": 128}, spec=FairnessSpec)
def fairness(config: EngineConfig, spec: FairnessSpec, progress: bool) -> "Result":
    """Difference in service between two tenants under vtc and fcfs, and what fairness costs."""
    from jaxserve.bench.fairness import measure_fairness
    from jaxserve.bench.sides import Sides

    return measure_fairness(config, spec, Sides(progress=progress))


@benchmark(
    (*BATCH, "tokenizer", "num_pages", "prefix_cache", "host_cache_memory", "starvation_timeout",
     "preemption", "shed_overdue"),
    defaults={"max_num_seqs": 4, "max_num_batched_tokens": 128},
    spec=PoliciesSpec,
)  # fmt: skip
def policies(config: EngineConfig, spec: PoliciesSpec, progress: bool) -> "Result":
    """Latency, TTFT and SLO attainment of every policy on one bursty trace.

    The prompts are chat prompts with answers of one word to --max-output-len tokens. All sides
    serve the same ones at the same times, on engines of their own, one after the other.
    """
    from jaxserve.bench.policies import measure_policies
    from jaxserve.bench.sides import Sides

    return measure_policies(config, spec, Sides(progress=progress))


@benchmark(
    (*BATCH, "tokenizer"),
    defaults={"max_num_seqs": 16, "max_num_batched_tokens": 128},
    spec=PredictorSpec,
)
def predictor(config: EngineConfig, spec: PredictorSpec, progress: bool) -> "Result":
    """Kendall's tau, bucket accuracy and error of each predictor, on answers kept out.

    MODEL answers varied chat prompts once; every predictor then learns from the first answers,
    in order, and predicts the others, beside always predicting the mean.
    """
    from jaxserve.bench.predictor import measure_predictors
    from jaxserve.bench.sides import Sides

    return measure_predictors(config, spec, Sides(progress=progress))


# A prompt that is run again would be found in a cache: the second side would seem faster.
@benchmark(ALL, defaults={"prefix_cache": False}, spec=GrammarSpec)
def grammars(config: EngineConfig, spec: GrammarSpec, progress: bool) -> "Result":
    """Whether answers under random JSON schemas parse and fit, and what grammars cost.

    Ends with 1 if a finished answer does not fit its schema.
    """
    from jaxserve.bench.grammars import measure_grammars, schema_judge
    from jaxserve.engine.build import build_sync_engine

    judge = schema_judge()
    # All requests of a round are given at once, so all of them must be allowed to wait.
    waiting = max(config.max_waiting, spec.num_schemas)
    config = dataclasses.replace(config, max_waiting=waiting)
    with contextlib.closing(build_sync_engine(config, progress=progress)) as engine:
        return measure_grammars(engine, spec, judge, progress=progress)
