"""From options to a running engine: model, mesh, weights, KV pool, programs, scheduler."""

import dataclasses
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

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
from jaxserve.runner.step_program import ModelGraph, StepProgram
from jaxserve.scheduling.build import build_policy, build_scheduler
from jaxserve.tokenizers.base import Tokenizer
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer
from jaxserve.tokenizers.loading import load_tokenizer
from pallas_kernels import linear, paged_attention
from pallas_kernels.tpu_layout import padded_to_lanes

log = logging.getLogger(__name__)

DEFAULT_MAX_MODEL_LEN = 8192  # longer contexts cost page-table width in every step
CPU_KV_GIB = 2.0
FREE_MEMORY_SHARE = 0.9  # of what an accelerator has left once the weights are there


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
    policy = build_policy(config)  # refused now, not after the weights are loaded
    mesh = make_mesh(config.mesh)
    path = None if config.random_weights else resolve_model(config.model)
    checkpoint = (
        open_checkpoint(path, allow_unknown=config.allow_unknown_config)
        if path
        else _random_checkpoint(config)
    )
    generation = read_generation(checkpoint, config.generation_config)
    model_config, rules = shard_model(checkpoint.config, mesh)
    dtype = _dtype(config)
    kv_dtype = dtype if config.kv_cache_dtype == "auto" else jnp.dtype(config.kv_cache_dtype)
    _check_divides(config, rules)
    max_model_len = _max_model_len(config, model_config)
    implementation = _attention(config, model_config, rules, dtype, kv_dtype)
    linear_implementation = _linear(config, rules, dtype)
    log.info("attention: %s, linear layers: %s", implementation, linear_implementation)
    graph = ModelGraph.of_model(model_config)
    params = load_params(checkpoint, graph.abstract_params(rules, dtype), progress=progress)
    # What the weights leave free decides about the pool, and the pool about the longest request:
    # one that the whole pool cannot hold could never be served.
    num_pages = _num_pages(config, model_config, rules, kv_dtype, max_model_len)
    max_model_len = min(max_model_len, num_pages // rules.data * config.page_size)
    limits = Buckets.of_config(config, max_model_len=max_model_len, num_shards=rules.data)
    program = StepProgram.of_graph(graph, rules, limits, implementation, linear_implementation)
    lowering = StepLowering(program, dtype, num_pages, config.page_size, kv_dtype)
    events, fingerprint = EventLog(), model_fingerprint(path, config)
    store = build_store(config, lowering, fingerprint, events)
    runner = DeviceRunner(lowering, params, store, prefix_cache=config.prefix_cache)
    paged_attention.prepare(implementation)
    linear.prepare(linear_implementation)
    cache = _program_cache(config, model_config, lowering)
    _compile(runner, cache, progress)
    predictor = build_predictor(
        config, params, model_config.hidden_size, max_model_len, fingerprint, cache
    )
    scheduler = build_scheduler(
        dataclasses.replace(config, num_pages=num_pages, max_model_len=max_model_len),
        step_sizes=[size * rules.data for size in limits.tokens],
        num_shards=rules.data,
        policy=policy,
        store=store,
        events=events,
        probe_every=predictor.probe_every,
        costs=estimate_costs(lowering),
    )
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
        num_pages=num_pages,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        platform=jax.devices()[0].platform,
        eos_token_ids=(),
        matryoshka_dimensions=model_config.matryoshka_dimensions,
        default_sampling_params=generation.sampling,
    )
    tokenizer = _tokenizer(config, checkpoint)
    tokenizer.parses_special_in_chat = config.chat_special_tokens
    eos = {*tokenizer.eos_token_ids, *model_config.eos_token_ids, *generation.eos_token_ids}
    info = dataclasses.replace(info, eos_token_ids=tuple(eos))
    log.info("KV cache: %d pages of %d tokens, %s", num_pages, config.page_size, kv_dtype.name)
    counter.ready()
    return Engine(
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


def _num_pages(
    config: EngineConfig,
    model: ModelConfig,
    rules: ShardingRules,
    kv_dtype: np.dtype,
    max_model_len: int,
) -> int:
    """Pages of the KV pool, over all data shards."""
    if config.num_pages is not None:
        return config.num_pages
    device = rules.mesh.devices.flat[0]
    kv_heads, head_dim = model.num_kv_heads // rules.head_parts, model.head_dim
    if device.platform == "tpu":
        head_dim = padded_to_lanes(head_dim)
    page_bytes = model.num_layers * 2 * kv_heads * head_dim * kv_dtype.itemsize
    page_bytes *= config.page_size
    stats = device.memory_stats() or {}
    if config.kv_cache_memory is not None:
        room = config.kv_cache_memory * 2**30
    elif "bytes_limit" in stats:
        room = (stats["bytes_limit"] - stats["bytes_in_use"]) * FREE_MEMORY_SHARE
    else:
        room = CPU_KV_GIB * 2**30
    # More could never be used.
    most = config.max_num_seqs // rules.data * -(-max_model_len // config.page_size)
    per_shard = min(int(room // page_bytes), most)
    if per_shard < 1:
        raise ConfigError(
            f"a KV page takes {page_bytes} bytes per device and there is room for none; raise "
            "--kv-cache-memory, shrink --page-size or split over more --mesh tensor shards"
        )
    return per_shard * rules.data


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


def _compile(runner: DeviceRunner, cache: ProgramCache, progress: bool) -> None:
    with tqdm(desc="compiling programs", delay=1, disable=None if progress else True) as bar:

        def show(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        runner.compile(cache, show)


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
