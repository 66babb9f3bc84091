"""Reads a `ModelConfig` from a Hugging Face config.json."""

from collections.abc import Mapping
from typing import Any

from jaxserve.core.errors import ConfigError
from jaxserve.models.config import MAX_LAYERS, Activation, ModelConfig, RopeScaling
from jaxserve.models.config_keys import HF_KEYS, ROPE_KEYS, check_keys
from jaxserve.models.config_readers import expand_window, gemma3_fields, sliding_fields
from jaxserve.models.config_values import ConfigValues

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}

# Hugging Face omits what equals the class's default, so each family's defaults are needed.
HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "mistral": {
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "sliding_window": 4096,
        "num_key_value_heads": 8,
    },
    "qwen2": {
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "sliding_window": 4096,
        "num_key_value_heads": 32, "max_window_layers": 28,
    },
    "gemma3_text": {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "sliding_window_pattern": 6, "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh", "eos_token_id": 1, "bos_token_id": 2,
    },
}  # fmt: skip
# Where null is a value of its own: no window, as many KV heads as query heads.
_NULLS = ("sliding_window", "num_key_value_heads")
_OUTER_KEYS = ("tie_word_embeddings", "eos_token_id", "bos_token_id")
_WHERE = "config.json"


def from_hf_config(
    data: Mapping[str, Any],
    *,
    name: str = "",
    generation_config: Mapping[str, Any] | None = None,
    allow_unknown: bool = False,
) -> ModelConfig:
    """Read a Hugging Face `config.json` (transformers 4 or 5) of a supported architecture.

    Args:
        data: the parsed file; a Gemma 3 vision model gives its text part.
        name: what to call the model; by default what the file says, or its model type.
        generation_config: the parsed `generation_config.json`; its EOS tokens come first.
        allow_unknown: go on with keys that are not known, see `check_keys`.

    Raises:
        ConfigError: the architecture, or a feature that it asks for, is not supported.
    """
    model_type, text = _text_part(data, allow_unknown)
    check_keys(text, HF_KEYS[model_type], _WHERE, allow_unknown=allow_unknown)
    # null means the default, but for a few.
    given = {k: v for k, v in text.items() if v is not None or k in _NULLS}
    values = ConfigValues(HF_DEFAULTS[model_type] | given, _WHERE)
    sizes = _sizes(values)
    generation = ConfigValues(generation_config or {}, "generation_config.json")
    eos = [*generation.token_ids("eos_token_id"), *values.token_ids("eos_token_id")]
    bos = values.token_ids("bos_token_id")
    is_gemma = model_type == "gemma3_text"
    window = _windows(values, model_type, sizes["num_layers"])
    theta, local_theta, scaling = _rope(values, is_gemma, allow_unknown)
    return ModelConfig(
        **sizes,
        **(gemma3_fields(sizes["hidden_size"]) if is_gemma else {"family": "llama"}),
        **sliding_fields(window, theta, local_theta, scaling, is_gemma),
        name=name or str(data.get("_name_or_path") or model_type),
        norm_eps=values.number("rms_norm_eps", least=0),
        tie_embeddings=values.flag("tie_word_embeddings", False),
        qkv_bias=model_type == "qwen2",
        activation=_activation(values),
        attention_scale=_scale(values, sizes["head_dim"]) if is_gemma else None,
        attention_soft_cap=values.positive("attn_logit_softcapping", None) if is_gemma else None,
        final_soft_cap=values.positive("final_logit_softcapping", None) if is_gemma else None,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        bos_token_id=bos[0] if bos else None,
        matryoshka_dimensions=_matryoshka(values),
    )


def _text_part(data: Mapping[str, Any], allow_unknown: bool) -> tuple[str, dict[str, Any]]:
    """The model type and the configuration of what is served."""
    model_type = data.get("model_type")
    text: dict[str, Any] = dict(data)
    if model_type == "gemma3":
        check_keys(data, HF_KEYS["gemma3"], _WHERE, allow_unknown=allow_unknown)
        # Token ids and tying beside the nested text configuration win over those inside it.
        outer = {k: v for k, v in data.items() if k in _OUTER_KEYS and v is not None}
        text = dict(ConfigValues(data, _WHERE).mapping("text_config").values) | outer
        model_type = "gemma3_text"
    if not isinstance(model_type, str) or model_type not in HF_DEFAULTS:
        raise ConfigError(
            f"architecture {model_type!r} is not supported; "
            f"supported: {', '.join(HF_DEFAULTS)}, gemma3"
        )
    return model_type, text


def _sizes(values: ConfigValues) -> dict[str, Any]:
    heads, hidden_size = values.integer("num_attention_heads"), values.integer("hidden_size")
    return {
        "vocab_size": values.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": values.integer("intermediate_size"),
        "num_layers": values.integer("num_hidden_layers", most=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": values.integer("num_key_value_heads", heads),
        "head_dim": values.integer("head_dim", hidden_size // heads),
        "max_model_len": values.integer("max_position_embeddings"),
    }


def _scale(values: ConfigValues, head_dim: int) -> float | None:
    scalar = values.positive("query_pre_attn_scalar")
    return None if scalar == head_dim else scalar**-0.5


def _matryoshka(values: ConfigValues) -> tuple[int, ...] | None:
    """Sizes to which embeddings may be cut, by vLLM's two keys."""
    sizes = tuple(values.sequence("matryoshka_dimensions"))
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise ConfigError(f"{_WHERE}: matryoshka_dimensions must be positive whole numbers")
    return sizes if sizes or values.flag("is_matryoshka", False) else None


def _activation(values: ConfigValues) -> Activation:
    name = values.text("hidden_activation", values.text("hidden_act", "silu"))
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation {name!r} is not supported")
    return ACTIVATIONS[name]


def _windows(values: ConfigValues, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    window = None if model_type == "llama" else values.integer("sliding_window", None)
    kinds = values.sequence("layer_types")
    if model_type == "llama" and any(kind != "full_attention" for kind in kinds):
        raise ConfigError(f"{_WHERE}: layer_types other than full_attention are not supported")
    if model_type == "qwen2" and not values.flag("use_sliding_window", False):
        window = None
    if window is None:
        return (None,) * num_layers
    if kinds:
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise ConfigError(f"layer type {kind!r} is not supported")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if model_type == "qwen2":
        first = values.integer("max_window_layers", least=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    # transformers 5 writes the pattern, when it does, with a leading underscore.
    pattern = values.integer("sliding_window_pattern", None)
    return expand_window(window, num_layers, values.integer("_sliding_window_pattern", pattern))


def _rope(
    values: ConfigValues, is_gemma: bool, allow_unknown: bool
) -> tuple[float, float | None, RopeScaling | None]:
    """(theta, local theta, scaling) of the layouts of transformers 4 and 5."""
    theta = values.positive("rope_theta", 10000.0)
    local_theta = values.positive("rope_local_base_freq") if is_gemma else None
    parameters = values.mapping("rope_parameters")
    if parameters.get("full_attention") is not None:
        local = parameters.mapping("sliding_attention")
        if _rope_scaling(local, allow_unknown) is not None:
            raise ConfigError("rope scaling on sliding layers is not supported")
        local_theta = local.positive("rope_theta", local_theta or theta)
        parameters = parameters.mapping("full_attention")
    theta = parameters.positive("rope_theta", theta)
    rope = parameters if parameters.values else values.mapping("rope_scaling")
    return theta, local_theta, _rope_scaling(rope, allow_unknown)


def _rope_scaling(rope: ConfigValues, allow_unknown: bool) -> RopeScaling | None:
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(
            f"rope type {kind!r} is not supported; supported: default, linear, llama3"
        )
    check_keys(rope.values, ROPE_KEYS, rope.where, allow_unknown=allow_unknown)
    if kind == "default":
        return None
    factor = rope.positive("factor")
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    return RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=rope.positive("low_freq_factor"),
        high_freq_factor=rope.positive("high_freq_factor"),
        original_max_len=rope.integer("original_max_position_embeddings"),
    )
