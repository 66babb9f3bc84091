"""What an engine will be: all that options, checkpoint, mesh and memory decide before it is made.

What is cheap to check is checked here, and not after minutes of loading and compiling.
"""

import dataclasses
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoints.base import Checkpoint
from jaxserve.checkpoints.generation import Generation, read_generation
from jaxserve.checkpoints.gguf_file import model_name
from jaxserve.checkpoints.load import open_checkpoint
from jaxserve.checkpoints.pull import resolve_model
from jaxserve.checkpoints.random_weights import RandomCheckpoint
from jaxserve.checkpoints.storage import formats_of
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.quality_bars import OPTIONS, quality_warnings
from jaxserve.engine.outputs import ModelInfo
from jaxserve.engine.pool_size import GIB, longest_request, num_pages
from jaxserve.engine.products import choose_products
from jaxserve.engine.stages import stage
from jaxserve.models.config import ModelConfig
from jaxserve.models.config_readers import from_preset
from jaxserve.models.graph import ModelGraph
from jaxserve.models.shard import shard_model
from jaxserve.parallel.mesh import ShardingRules, bytes_per_device, make_mesh
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.step_program import StepProgram
from jaxserve.tokenizers.base import Tokenizer
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer
from jaxserve.tokenizers.loading import load_tokenizer
from pallas_kernels import linear, paged_attention
from pallas_kernels.kv_pages import kv_dtype_name, kv_dtype_of

log = logging.getLogger(__name__)

DEFAULT_MAX_MODEL_LEN = 8192  # longer contexts cost page-table width in every step


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """An engine before it is made.

    Attributes:
        config: the options.
        path: the model's file or directory; None for random weights.
        checkpoint: its weights, not read yet.
        generation: how the model wants to be sampled.
        tokenizer: its tokenizer.
        model: its architecture, fitted to the mesh.
        max_model_len: longest prompt plus answer, in tokens.
        lowering: the step's programs, and the shapes of weights and KV pool.
    """

    config: EngineConfig
    path: Path | None
    checkpoint: Checkpoint
    generation: Generation
    tokenizer: Tokenizer
    model: ModelConfig
    max_model_len: int
    lowering: StepLowering

    @property
    def rules(self) -> ShardingRules:
        """The mesh, and what is split over it."""
        return self.lowering.rules

    def facts(self) -> ModelInfo:
        """What clients are told of the model and how it is run."""
        config, model, lowering = self.config, self.model, self.lowering
        eos = {
            *self.tokenizer.eos_token_ids, *model.eos_token_ids, *self.generation.eos_token_ids
        }  # fmt: skip
        return ModelInfo(
            name=config.served_model_name or short_name(config.model),
            family=model.family,
            max_model_len=self.max_model_len,
            vocab_size=model.vocab_size,
            num_layers=model.num_layers,
            dtype=lowering.dtype.name,
            kv_cache_dtype=kv_dtype_name(lowering.kv_dtype),
            mesh=f"data={self.rules.data},tensor={self.rules.tensor}",
            attention_implementation=lowering.program.backend.implementation,
            linear_implementation=lowering.program.backend.linear_implementation,
            page_size=config.page_size,
            num_pages=lowering.num_pages,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            platform=jax.devices()[0].platform,
            eos_token_ids=tuple(eos),
            is_matryoshka=model.matryoshka_dimensions is not None,
            matryoshka_dimensions=model.matryoshka_dimensions or (),
            default_sampling_params=self.generation.sampling,
        )


def draw_up(config: EngineConfig) -> Blueprint:
    """Decide all that can be decided without reading weights or compiling.

    Raises:
        ConfigError, CheckpointError, ModelNotFound: the options, the mesh or the model's files
            do not allow it; the message says what to do.
    """
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
    model, rules = shard_model(checkpoint.config, mesh)
    model = model.for_context(_max_model_len(config, model))
    _check_divides(config, rules)
    if (config.num_spans or 1) > model.num_layers:
        raise ConfigError(
            f"num_spans {config.num_spans} is more than the {model.num_layers} layers of "
            f"{model.name}"
        )
    lowering, max_model_len = _lowering(config, checkpoint, model, rules)
    return Blueprint(
        config, path, checkpoint, generation, tokenizer, model, max_model_len, lowering
    )


def _lowering(
    config: EngineConfig, checkpoint: Checkpoint, model: ModelConfig, rules: ShardingRules
) -> tuple[StepLowering, int]:
    """The step's programs, and the longest request that they can serve."""
    dtype = _dtype(config)
    kv_dtype = dtype if config.kv_cache_dtype == "auto" else kv_dtype_of(config.kv_cache_dtype)
    max_model_len = _max_model_len(config, model)
    attention = _attention(config, model, rules, dtype, kv_dtype)
    graph = ModelGraph(model)
    products, storage = choose_products(config, checkpoint, graph.parameters, rules, dtype)
    # What the weights leave free decides about the pool, and the pool about the longest request.
    weights = graph.abstract_params(rules, dtype, storage)
    pool = num_pages(config, model, rules, kv_dtype, max_model_len, weights)
    max_model_len = longest_request(config, max_model_len, pool // rules.data)
    buckets = Buckets.of_config(config, max_model_len=max_model_len, num_shards=rules.data)
    activations: linear.Activations = "int8" if config.activation_dtype == "int8" else "float"
    program = StepProgram.of_graph(
        graph, rules, buckets, attention, products, activations, config.num_spans,
        bytes_per_device(weights),
    )  # fmt: skip
    lowering = StepLowering(program, dtype, pool, config.page_size, kv_dtype, storage)
    log.info(
        "attention: %s, linear layers: %s, weights: %s; KV cache: %d pages of %d tokens, %.2f GiB "
        "of %s per device; requests of up to %d tokens%s", attention, products,
        ", ".join(map(str, formats_of(storage))) or dtype.name, pool, config.page_size,
        lowering.page_bytes * lowering.pages_per_shard / GIB, kv_dtype_name(kv_dtype),
        max_model_len,
        _why(max_model_len, config, model),
    )  # fmt: skip
    for warning in quality_warnings({name: getattr(config, name) for name in OPTIONS}):
        log.warning("%s", warning)
    if program.num_spans > 1:
        different = len(set(lowering.span_kinds))
        log.info("layers in %d spans, %d of them different", program.num_spans, different)
    return lowering, max_model_len


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


def _why(max_model_len: int, config: EngineConfig, model: ModelConfig) -> str:
    """Where the longest request's length comes from, if no option has it."""
    if config.max_model_len is not None:
        return ""
    if max_model_len == model.max_model_len:
        return ", what the model was made for"
    of_model = f"of the {model.max_model_len} that the model was made for"
    if max_model_len == DEFAULT_MAX_MODEL_LEN:
        return f" by default, {of_model}: --max-model-len allows more"
    return f", {of_model}: what the KV cache holds"


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
        chosen = f" (--dtype {dtype.name}, --kv-cache-dtype {kv_dtype_name(kv_dtype)})"
        raise ConfigError(f"{error}{chosen if kv_dtype != dtype else ''}") from error


def _tokenizer(config: EngineConfig, checkpoint: Checkpoint) -> Tokenizer:
    if config.tokenizer is not None:
        return load_tokenizer(Path(config.tokenizer))
    if config.random_weights:
        return ByteTokenizer()  # random weights speak no language
    return load_tokenizer(checkpoint.tokenizer_path)


def short_name(model: str) -> str:
    """What a model is served as, unless an option says."""
    path = Path(model)
    return model_name(path) if path.is_file() else path.name if path.is_dir() else model
