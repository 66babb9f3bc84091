"""Commands of `jaxserve bench` that time the engine, its host and its front end."""

import contextlib
import dataclasses
from typing import TYPE_CHECKING

import click

from jaxserve.bench.load_settings import LatencySpec, ThroughputSpec, WorkloadSpec
from jaxserve.bench.settings import (
    BucketsSpec,
    CompareSpec,
    FrontendSpec,
    HostCostSpec,
    PaddingSpec,
    QualitySpec,
    SpansSpec,
    StartupSpec,
    StepsSpec,
)
from jaxserve.cli.benchmark import ALL, BATCH, DEVICE, MODEL, REPLAYED, benchmark
from jaxserve.core.config import EngineConfig

if TYPE_CHECKING:
    from jaxserve.bench.tables import Result

# What a batch has computed would be found by the next one: a cache, not the engine, is timed.
_WITHOUT_CACHE = {"prefix_cache": False}


@benchmark(ALL, defaults=_WITHOUT_CACHE, dataset=WorkloadSpec, spec=ThroughputSpec)
def throughput(
    config: EngineConfig, dataset: WorkloadSpec, spec: ThroughputSpec, progress: bool
) -> "Result":
    """Offline throughput: give the engine all requests at once."""
    from jaxserve.bench.offline import measure_throughput, require_room
    from jaxserve.bench.workloads import build_workload
    from jaxserve.llm import LLM

    lengths = {"random_input_len": spec.input_len, "random_output_len": spec.output_len}
    dataset = dataclasses.replace(dataset, **{k: v for k, v in lengths.items() if v is not None})
    # All requests are given at once, so all of them must be allowed to wait.
    waiting = max(config.max_waiting, dataset.num_prompts)
    with contextlib.closing(LLM(**{**dataclasses.asdict(config), "max_waiting": waiting})) as llm:
        info = llm.model_info
        workload = build_workload(dataset, info.vocab_size, info.eos_token_ids)
        click.echo(str(workload))
        require_room(workload.items, info.max_model_len)
        return measure_throughput(llm, workload.items, progress=progress)


@benchmark(ALL, defaults=_WITHOUT_CACHE, spec=LatencySpec)
def latency(config: EngineConfig, spec: LatencySpec, progress: bool) -> "Result":
    """Offline latency of one batch, from all prompts in to the last token out."""
    from jaxserve.bench.offline import measure_latency, require_room
    from jaxserve.bench.workloads import build_workload
    from jaxserve.llm import LLM

    dataset = WorkloadSpec(
        num_prompts=spec.batch_size,
        random_input_len=spec.input_len,
        random_output_len=spec.output_len,
        seed=spec.seed,
    )
    with contextlib.closing(LLM(**dataclasses.asdict(config))) as llm:
        info = llm.model_info
        items = build_workload(dataset, info.vocab_size, info.eos_token_ids).items
        require_room(items, info.max_model_len)
        return measure_latency(llm, items, spec, progress=progress)


@benchmark([name for name in ALL if name != "compilation_cache_dir"], spec=StartupSpec)
def startup(config: EngineConfig, spec: StartupSpec, progress: bool) -> "Result":
    """Seconds from process start to READY, and programs compiled, cold and warm."""
    from jaxserve.bench.startup import run_startups

    return run_startups(config, spec, progress=progress)


@benchmark(
    (*MODEL, "kv_cache_dtype", "attention_implementation", "linear_implementation"),
    spec=StepsSpec,
)
def steps(config: EngineConfig, spec: StepsSpec, progress: bool) -> "Result":
    """Device time of a decode step by rows and context, and attention's share of it.

    The share is what a step takes longer than one whose rows attend to themselves only.
    """
    from jaxserve.bench.sides import Sides
    from jaxserve.bench.step_time import measure_steps_by_context

    return measure_steps_by_context(config, spec, Sides(progress=progress))


@benchmark(
    (*MODEL, "kv_cache_dtype", "attention_implementation", "linear_implementation"),
    spec=SpansSpec,
)
def spans(config: EngineConfig, spec: SpansSpec, progress: bool) -> "Result":
    """Device time of a decode step by the number of spans that the layers are cut into."""
    from jaxserve.bench.sides import Sides
    from jaxserve.bench.spans import measure_spans

    return measure_spans(config, spec, Sides(progress=progress))


@benchmark(
    (*BATCH, "mesh", "kv_cache_memory", "attention_implementation", "linear_implementation"),
    spec=QualitySpec,
)
def quality(config: EngineConfig, spec: QualitySpec, progress: bool) -> "Result":
    """Perplexity and likeliest tokens by the formats of weights, activations and KV."""
    from jaxserve.bench.quality import measure_quality
    from jaxserve.llm import LLM

    waiting = max(config.max_waiting, spec.num_tokens)  # all windows are given at once
    config = dataclasses.replace(config, max_waiting=waiting)
    return measure_quality(config, spec, LLM, progress=progress)


@benchmark(MODEL, model_required=False, spec=HostCostSpec)
def host_cost(config: EngineConfig, spec: HostCostSpec, progress: bool) -> "Result":
    """Host time per step (plan, pack, commit) by policy and requests waiting."""
    from jaxserve.bench.host_cost import measure_host_costs
    from jaxserve.bench.sides import Sides

    return measure_host_costs(config, spec, Sides(progress=progress))


@benchmark((*DEVICE, *REPLAYED, "page_size"), model_required=False, spec=BucketsSpec)
def buckets(config: EngineConfig, spec: BucketsSpec, progress: bool) -> "Result":
    """Choose the buckets that steps are padded to, from a trace or from what was served.

    A trace is replayed through the scheduler in simulated time.
    """
    from jaxserve.bench.buckets import measure_buckets
    from jaxserve.bench.sides import Sides

    return measure_buckets(config, spec, Sides(progress=progress))


@benchmark(
    (*DEVICE, *REPLAYED, "overlap", "length_predictor"),
    model_required=False,
    defaults={"max_model_len": 2048},
    spec=PaddingSpec,
)
def padding(config: EngineConfig, spec: PaddingSpec, progress: bool) -> "Result":
    """Padding of steps and unused KV on a trace, with doubling and with chosen buckets."""
    from jaxserve.bench.padding import measure_padding
    from jaxserve.bench.sides import Sides
    from jaxserve.bench.workloads import load_trace

    items = load_trace(spec.trace, spec.num_requests + spec.num_calibration, config.seed)
    return measure_padding(config, items, spec, Sides(progress=progress))


@benchmark(spec=FrontendSpec)
def frontend(spec: FrontendSpec, progress: bool) -> "Result":
    """Share of an engine's tokens that reach clients, and how much its steps are slowed."""
    from jaxserve.bench.frontend.measure import measure_front_ends
    from jaxserve.bench.sides import Sides

    return measure_front_ends(spec, Sides(progress=progress))


@benchmark(
    ("model", "seed", "compilation_cache_dir", "page_size", "max_num_batched_tokens", "overlap"),
    spec=CompareSpec,
)
def peers(config: EngineConfig, spec: CompareSpec, progress: bool) -> "Result":
    """Compare with transformers and llama.cpp on this machine's CPU, in float32.

    MODEL is a GGUF file or the name of a demo model.
    """
    from jaxserve.bench.peers.compare import measure_peers
    from jaxserve.bench.sides import Sides

    config = dataclasses.replace(config, quantization="none")
    return measure_peers(config, spec, Sides(progress=progress))
