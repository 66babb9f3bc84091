"""From a blueprint to a running engine: weights, KV pool, programs, scheduler."""

import contextlib
import dataclasses
import logging
import threading
import time
from pathlib import Path

from jaxserve.cache.events import EventLog
from jaxserve.cache.page_store import PageStore
from jaxserve.checkpoints.load import load_params
from jaxserve.core.at_exit import done_before_exit
from jaxserve.core.config import EngineConfig
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.blueprint import Blueprint, draw_up
from jaxserve.engine.build_parts import (
    build_predictor,
    build_store,
    estimate_costs,
    model_fingerprint,
)
from jaxserve.engine.engine import Engine
from jaxserve.engine.pool_size import out_of_memory
from jaxserve.engine.stages import counting, stage, stage_done
from jaxserve.files.cache_home import cache_home
from jaxserve.models.graph import Params
from jaxserve.models.weights import DENSE
from jaxserve.prediction.base import LengthPredictor
from jaxserve.runner.compile_counter import CompileCounter
from jaxserve.runner.device_runner import DeviceRunner
from jaxserve.runner.profiler import JaxProfiler
from jaxserve.runner.program_cache import CompileWatch, ProgramCache
from jaxserve.runner.program_loading import ProgramLoading
from jaxserve.runner.step_jobs import step_jobs
from jaxserve.scheduling.build import build_policy, build_scheduler
from jaxserve.scheduling.policies.base import Policy
from jaxserve.scheduling.scheduler import Scheduler
from pallas_kernels import linear, paged_attention
from pallas_kernels.weights import Format

log = logging.getLogger(__name__)


def build_engine(config: EngineConfig, *, progress: bool = True) -> AsyncEngine:
    """Build an engine on a thread of its own; returns when every program is compiled.

    Raises:
        ConfigError, CheckpointError, ModelNotFound: the options, the mesh or the model's files
            do not allow it; the message says what to do.
    """
    return AsyncEngine(build_sync_engine(config, progress=progress))


def build_sync_engine(config: EngineConfig, *, progress: bool = True) -> Engine:
    """Build an engine that its caller steps; see `build_engine`."""
    with done_before_exit():
        return _built(config, progress)


def _built(config: EngineConfig, progress: bool) -> Engine:
    counter = CompileCounter(strict=config.strict_compile)
    CompileWatch(counter)
    policy = build_policy(config)
    plan = draw_up(config)
    events, fingerprint = EventLog(), model_fingerprint(plan.path, config)
    store = build_store(config, plan.lowering, fingerprint, events)
    cache = _program_cache(plan)
    params, runner = _load(plan, store, cache, counter, progress)
    predictor = build_predictor(
        config, params, plan.model.hidden_size, plan.max_model_len, fingerprint, cache
    )
    scheduler = _scheduler(plan, policy, store, events, predictor)
    counter.ready()
    return Engine(
        scheduler,
        runner,
        plan.tokenizer,
        plan.facts(),
        overlap=config.overlap,
        embedding_pooling=config.embedding_pooling,
        json_whitespace=config.json_whitespace,
        seed=config.seed,
        compiles=counter,
        predictor=predictor,
        num_shards=plan.rules.data,
        buckets=plan.lowering.program.buckets,
        ready_buckets=lambda: runner.ready_buckets,
        store=store,
        events=events,
        profiler=JaxProfiler(),
    )


def _load(
    plan: Blueprint,
    store: PageStore | None,
    cache: ProgramCache,
    counter: CompileCounter,
    progress: bool,
) -> tuple[Params, DeviceRunner]:
    """Weights, and a runner that is warm; its programs come while they are read."""
    config, lowering = plan.config, plan.lowering
    kernels = threading.Event()
    loading = ProgramLoading(
        cache,
        step_jobs(lowering, stores=store is not None, copies=config.prefix_cache),
        all_first=config.ready == "all",
        prepare=lambda: _prepare_kernels(plan, kernels),
        counter=counter,
    )
    with contextlib.ExitStack() as undo:
        undo.callback(loading.close)
        with out_of_memory("weights and KV cache"), stage("weights", "weights loaded"):
            params = load_params(plan.checkpoint, lowering.params, progress=progress)
            runner = DeviceRunner(lowering, params, store, prefix_cache=config.prefix_cache)
        _use(runner, loading, kernels, counter, progress)
        undo.pop_all()
    return params, runner


def _prepare_kernels(plan: Blueprint, done: threading.Event) -> None:
    backend = plan.lowering.program.backend
    with stage("kernels", "kernels ready"):
        paged_attention.prepare(backend.implementation, plan.lowering.kv_dtype)
        for format in _formats(plan):
            activations = backend.activations_for(format)
            linear.prepare(backend.linear_implementation, format, activations)
    done.set()


def _formats(plan: Blueprint) -> set[Format | None]:
    """The formats that weights are held in, None among them if some are not quantised."""
    lowering = plan.lowering
    return {
        format
        for name, parameter in lowering.program.graph.parameters.items()
        if parameter.kind == "weight"
        for format in lowering.storage.get(name, DENSE)
    }


def _use(
    runner: DeviceRunner,
    loading: ProgramLoading,
    kernels: threading.Event,
    counter: CompileCounter,
    progress: bool,
) -> None:
    started = time.monotonic()

    def describe() -> str:
        if not kernels.is_set():  # compiled by a first start only
            return "compiling or loading kernels"
        return "compiling programs" if counter.before_ready else "loading programs"

    with counting(describe, bar=progress) as show:
        show(0, loading.num_needed)
        runner.use(loading, show)
    done = f"{loading.num_needed} programs ready, {counter.before_ready} of them compiled"
    stage_done("programs", done, time.monotonic() - started)


def _scheduler(
    plan: Blueprint,
    policy: Policy,
    store: PageStore | None,
    events: EventLog,
    predictor: LengthPredictor,
) -> Scheduler:
    lowering = plan.lowering
    return build_scheduler(
        dataclasses.replace(
            plan.config, num_pages=lowering.num_pages, max_model_len=plan.max_model_len
        ),
        step_sizes=[size * plan.rules.data for size in lowering.program.buckets.tokens],
        num_shards=plan.rules.data,
        policy=policy,
        store=store,
        events=events,
        probe_every=predictor.probe_every,
        costs=estimate_costs(lowering),
    )


def _program_cache(plan: Blueprint) -> ProgramCache:
    config, lowering = plan.config, plan.lowering
    backend, mesh = lowering.program.backend, lowering.rules.mesh
    settings = {
        "model": plan.model,
        "mesh": config.mesh,
        "buckets": lowering.program.buckets,
        "spans": lowering.program.num_spans,
        "num_pages": lowering.num_pages,
        "page_size": config.page_size,
        "dtype": lowering.dtype.name,
        "kv_dtype": lowering.kv_dtype.name,
        "attention": backend.implementation,
        "linear": backend.linear_implementation,
        "activations": backend.activations,
        "storage": lowering.storage,
    }
    directory = config.compilation_cache_dir
    path = cache_home("programs") if directory is None else Path(directory)
    return ProgramCache(path, settings, [d.id for d in mesh.devices.flat])
