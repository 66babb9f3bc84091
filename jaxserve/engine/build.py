"""From options to a running engine: model, mesh, weights, KV pool, programs, scheduler."""

import contextlib
import dataclasses
import logging
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.cache.events import EventLog
from jaxserve.checkpoints.base import Checkpoint
from jaxserve.checkpoints.generation import read_generation
from jaxserve.checkpoints.load import load_params, open_checkpoint
from jaxserve.checkpoints.pull import resolve_model
from jaxserve.checkpoints.random_weights import RandomCheckpoint
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.build_parts import (
    build_predictor,
    build_store,
    estimate_costs,
    model_fingerprint,
)
from jaxserve.engine.engine import Engine
from jaxserve.engine.outputs import ModelInfo
from jaxserve.engine.pool_size import GIB, longest_request, num_pages, out_of_memory
from jaxserve.engine.stages import counting, stage, stage_done
from jaxserve.files.cache_home import cache_home
from jaxserve.models.config import ModelConfig
from jaxserve.models.config_readers import from_preset
from jaxserve.models.shard import shard_model
from jaxserve.parallel.mesh import ShardingRules, make_mesh
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.compile_counter import CompileCounter
from jaxserve.runner.device_runner import DeviceRunner
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.profiler import JaxProfiler
from jaxserve.runner.program_cache import CompileWatch, ProgramCache
from jaxserve.runner.program_loading import ProgramLoading
from jaxserve.runner.step_jobs import step_jobs
from jaxserve.runner.step_program import ModelGraph, StepProgram
from jaxserve.scheduling.build import build_policy, build_scheduler
from jaxserve.tokenizers.base import Tokenizer
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer
from jaxserve.tokenizers.loading import load_tokenizer
from pallas_kernels import linear, paged_attention

log = logging.getLogger(__name__)

DEFAULT_MAX_MODEL_LEN = 8192  # longer contexts cost page-table width in every step


def build_engine(config: EngineConfig, *, progress: bool = True) -> AsyncEngine:
    """Build an engine on a thread of its own; returns when every program is compiled.

    Raises:
        ConfigError, CheckpointError, ModelNotFound: the options, the mesh or the model's files
            do not allow it; the message says what to do.
    """
    return AsyncEngine(build_sync_engine(config, progress=progress))


def build_sync_engine(config: EngineConfig, *, progress: bool = True) -> Engine:
    """Build an engine that its caller steps; see `build_engine`."""
    counter = CompileCounter(strict=config.strict_compile)
    CompileWatch(counter)
    # What is cheap to check is checked first: not after minutes of loading and compiling.
    policy = build_policy(config)
    mesh = make_mesh(config.mesh)
    with stage("checkpoint", "checkpoint and tokenizer read"):
        path = None if config.random_weights else resolve_model(config.model)
        checkpoint = (
            open_checkpoint(path, allow_unknown=config.allow_unknown_config)
            if path
            else _random_checkpoint(config)
        )
        generation = read_generation(checkpoint, config.generation_config)
        tokenizer = _tokenizer(config, checkpoint)
        tokenizer.parses_special_in_chat = config.chat_special_tokens
    model_config, rules = shard_model(checkpoint.config, mesh)
    dtype = _dtype(config)
    kv_dtype = dtype if config.kv_cache_dtype == "auto" else jnp.dtype(config.kv_cache_dtype)
    _check_divides(config, rules)
    max_model_len = _max_model_len(config, model_config)
    implementation = _attention(config, model_config, rules, dtype, kv_dtype)
    linear_implementation = _linear(config, rules, dtype)
    graph = ModelGraph.of_model(model_config)
    params_wanted = graph.abstract_params(rules, dtype)
    # What the weights leave free decides about the pool, and the pool about the longest request.
    pool = num_pages(config, model_config, rules, kv_dtype, max_model_len, params_wanted)
    max_model_len = longest_request(config, max_model_len, pool // rules.data)
    limits = Buckets.of_config(config, max_model_len=max_model_len, num_shards=rules.data)
    program = StepProgram.of_graph(graph, rules, limits, implementation, linear_implementation)
    lowering = StepLowering(program, dtype, pool, config.page_size, kv_dtype)
    log.info(
        "attention: %s, linear layers: %s; KV cache: %d pages of %d tokens, %.2f GiB of %s per "
        "device; requests of up to %d tokens", implementation, linear_implementation, pool,
        config.page_size, lowering.page_bytes * lowering.pages_per_shard / GIB, kv_dtype.name,
        max_model_len,
    )  # fmt: skip
    events, fingerprint = EventLog(), model_fingerprint(path, config)
    store = build_store(config, lowering, fingerprint, events)
    cache = _program_cache(config, model_config, lowering)
    loading = ProgramLoading(
        cache,
        step_jobs(lowering, stores=store is not None, copies=config.prefix_cache),
        all_first=config.ready == "all",
        prepare=partial(_prepare_kernels, implementation, linear_implementation),
        counter=counter,
    )
    with contextlib.ExitStack() as undo:
        undo.callback(loading.close)
        with out_of_memory("weights and KV cache"), stage("weights", "weights loaded"):
            params = load_params(checkpoint, params_wanted, progress=progress)
            runner = DeviceRunner(lowering, params, store, prefix_cache=config.prefix_cache)
        _use(runner, loading, counter, progress)
        undo.pop_all()
    for kind, seconds in cache.seconds.items():
        if seconds:
            stage_done(f"programs-{kind}", f"programs {kind}, all threads together", seconds)
    predictor = build_predictor(
        config, params, model_config.hidden_size, max_model_len, fingerprint, cache
    )
    scheduler = build_scheduler(
        dataclasses.replace(config, num_pages=pool, max_model_len=max_model_len),
        step_sizes=[size * rules.data for size in limits.tokens],
        num_shards=rules.data,
        policy=policy,
        store=store,
        events=events,
        probe_every=predictor.probe_every,
        costs=estimate_costs(lowering),
    )
    eos = {*tokenizer.eos_token_ids, *model_config.eos_token_ids, *generation.eos_token_ids}
    info = ModelInfo(
        name=config.served_model_name or _short_name(config.model),
        family=model_config.family,
        max_model_len=max_model_len,
        vocab_size=model_config.vocab_size,
        num_layers=model_config.num_layers,
        dtype=dtype.name,
        kv_cache_dtype=kv_dtype.name,
        mesh=f"data={rules.data},tensor={rules.tensor}",
        attention_implementation=implementation,
        linear_implementation=linear_implementation,
        page_size=config.page_size,
        num_pages=pool,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        platform=jax.devices()[0].platform,
        eos_token_ids=tuple(eos),
        is_matryoshka=model_config.matryoshka_dimensions is not None,
        matryoshka_dimensions=model_config.matryoshka_dimensions or (),
        default_sampling_params=generation.sampling,
    )
    counter.ready()
    engine = Engine(
        scheduler,
        runner,
        tokenizer,
        info,
        overlap=config.overlap,
        embedding_pooling=config.embedding_pooling,
        json_whitespace=config.json_whitespace,
        seed=config.seed,
        compiles=counter,
        predictor=predictor,
        num_shards=rules.data,
        buckets=limits,
        store=store,
        events=events,
        profiler=JaxProfiler(),
    )
    engine.records.padded_to = lambda: runner.ready_buckets
    return engine


def _prepare_kernels(implementation: str, linear_implementation: str) -> None:
    with stage("kernels", "kernels ready"):
        paged_attention.prepare(implementation)
        linear.prepare(linear_implementation)


def _use(
    runner: DeviceRunner, loading: ProgramLoading, counter: CompileCounter, progress: bool
) -> None:
    started = time.monotonic()

    def describe() -> str:
        return "compiling programs" if counter.before_ready else "loading programs"

    with counting(describe, bar=progress) as show:
        runner.use(loading, show)
    done = f"{loading.num_needed} programs ready, {counter.before_ready} of them compiled"
    stage_done("programs", done, time.monotonic() - started)


def _check_divides(config: EngineConfig, rules: ShardingRules) -> None:
    for field in ("max_num_seqs", "max_num_batched_tokens", "num_pages"):
        value = getattr(config, field)
        if value is not None and value % rules.data:
            raise ConfigError(f"{field} {value} must divide by the mesh's data={rules.data}")


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_len is None:
        return min(model.max_model_len, DEFAULT_MAX_MODEL_LEN)
    if config.max_model_len > model.max_model_len:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is more than the {model.max_model_len} that "
            f"{model.name} was made for"
        )
    return config.max_model_len


def _random_checkpoint(config: EngineConfig) -> Checkpoint:
    return RandomCheckpoint(from_preset(config.model), config.seed)


def _dtype(config: EngineConfig) -> np.dtype:
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    # XLA:CPU computes bfloat16 matmuls many times slower than float32 ones.
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")


def _attention(
    config: EngineConfig,
    model: ModelConfig,
    rules: ShardingRules,
    dtype: np.dtype,
    kv_dtype: np.dtype,
) -> str:
    """The attention that runs on this mesh's devices."""
    device, parts = rules.mesh.devices.flat[0], rules.head_parts
    heads, kv_heads = model.num_heads // parts, model.num_kv_heads // parts
    shape = paged_attention.Shape(
        heads, kv_heads, model.head_dim, config.page_size, kv_dtype, dtype
    )
    try:
        return paged_attention.choose_implementation(config.attention_implementation, device, shape)
    except ValueError as error:
        chosen = f" (--dtype {dtype.name}, --kv-cache-dtype {kv_dtype.name})"
        raise ConfigError(f"{error}{chosen if kv_dtype != dtype else ''}") from error


def _linear(config: EngineConfig, rules: ShardingRules, dtype: np.dtype) -> str:
    """The products with weights that run on this mesh's devices."""
    devices = rules.mesh.devices
    try:
        return linear.choose_implementation(
            config.linear_implementation, devices.flat[0], devices.size, dtype
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _program_cache(
    config: EngineConfig, model: ModelConfig, lowering: StepLowering
) -> ProgramCache:
    backend, mesh = lowering.program.backend, lowering.rules.mesh
    settings = {
        "model": model,
        "mesh": config.mesh,
        "buckets": lowering.program.buckets,
        "num_pages": lowering.num_pages,
        "page_size": config.page_size,
        "dtype": lowering.dtype.name,
        "kv_dtype": lowering.kv_dtype.name,
        "attention": backend.implementation,
        "linear": backend.linear_implementation,
    }
    return ProgramCache(_cache_dir(config), settings, [d.id for d in mesh.devices.flat])


def _cache_dir(config: EngineConfig) -> Path:
    if config.compilation_cache_dir is not None:
        return Path(config.compilation_cache_dir)
    return cache_home("programs")


def _short_name(model: str) -> str:
    path = Path(model)
    return path.stem if path.is_file() else path.name if path.is_dir() else model


def _tokenizer(config: EngineConfig, checkpoint: Checkpoint) -> Tokenizer:
    if config.tokenizer is not None:
        return load_tokenizer(Path(config.tokenizer))
    if config.random_weights:
        return ByteTokenizer()  # random weights speak no language
    return load_tokenizer(checkpoint.tokenizer_path)
