"""Reads a `ModelConfig` from the places it is written down: HF config.json, GGUF, TOML presets.

Whatever a source asks for that the models here do not compute (a rope type, experts, biases,
quantisation) raises ConfigError by name: a model is served as trained or not at all.
"""

import dataclasses
import importlib.resources
import math
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.core.errors import ConfigError, ModelNotFound
from jaxserve.models.config import Activation, ModelConfig, RopeScaling

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


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Turn the configuration into JSON-ready values; `config_from_dict` gives the same one back."""
    return dataclasses.asdict(config)


def config_from_dict(data: Mapping[str, Any]) -> ModelConfig:
    """Build a configuration from the names of `ModelConfig`'s own fields.

    `sliding_window` may be one number with `sliding_pattern = n` beside it: every n-th layer
    then attends fully and the others within the window (without a pattern, all within it).

    Raises:
        ConfigError: a field is unknown or missing, or the sizes do not fit together.
    """
    values = dict(data)
    pattern = values.pop("sliding_pattern", None)
    window = values.get("sliding_window") or ()
    if isinstance(window, int):
        window = expand_window(window, int(values.get("num_layers", 0)), pattern)
    values["sliding_window"] = tuple(window)
    if values.get("rope_scaling") is not None:
        values["rope_scaling"] = _construct(RopeScaling, values["rope_scaling"])
    values["eos_token_ids"] = tuple(values.get("eos_token_ids", ()))
    return _construct(ModelConfig, values)


def _construct(cls: type, values: Mapping[str, Any]) -> Any:
    fields = dataclasses.fields(cls)
    if unknown := set(values) - {f.name for f in fields}:
        raise ConfigError(f"unknown fields of {cls.__name__}: {', '.join(sorted(unknown))}")
    required = {f.name for f in fields if f.default is dataclasses.MISSING}
    if missing := required - set(values):
        raise ConfigError(f"missing fields of {cls.__name__}: {', '.join(sorted(missing))}")
    return cls(**values)


def expand_window(window: int, num_layers: int, pattern: int | None) -> tuple[int | None, ...]:
    """One window per layer; every `pattern`-th layer (None: no layer) attends fully."""
    return tuple(
        None if pattern and (layer + 1) % pattern == 0 else window for layer in range(num_layers)
    )


def preset_names() -> tuple[str, ...]:
    """Names of the presets in `model_configs/`, sorted."""
    files = importlib.resources.files("model_configs").iterdir()
    return tuple(sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml")))


def from_preset(name: str) -> ModelConfig:
    """Read the preset `model_configs/NAME.toml`.

    Raises:
        ModelNotFound: there is no such preset (the message lists those there are).
        ConfigError: the preset is wrong.
    """
    if name not in preset_names():
        raise ModelNotFound(f"no preset named {name!r}; there are: {', '.join(preset_names())}")
    text = (importlib.resources.files("model_configs") / f"{name}.toml").read_text("utf-8")
    return config_from_dict({"name": name, **tomllib.loads(text)})


# ---------------------------------------------------------------- Hugging Face config.json


def from_hf_config(
    data: Mapping[str, Any],
    *,
    name: str = "",
    generation_config: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """Read a Hugging Face `config.json` (transformers 4 or 5) of a supported architecture.

    Args:
        data: the parsed file; a Gemma 3 vision model gives its text part.
        name: what to call the model; by default what the file says, or its model type.
        generation_config: the parsed `generation_config.json`; its EOS tokens come first.

    Raises:
        ConfigError: the architecture, or a feature that it asks for, is not supported.
    """
    model_type = data.get("model_type")
    text: dict[str, Any] = dict(data)
    if model_type == "gemma3":
        # Token ids and tying beside the nested text configuration win over those inside it.
        outer = {k: v for k, v in data.items() if k in _OUTER_KEYS and v is not None}
        text = dict(data.get("text_config") or {}) | outer
        model_type = "gemma3_text"
    if model_type not in HF_DEFAULTS:
        raise ConfigError(
            f"architecture {model_type!r} is not supported; "
            f"supported: {', '.join(HF_DEFAULTS)}, gemma3"
        )
    # null means the default, except that no sliding window is a value of its own.
    given = {k: v for k, v in text.items() if v is not None or k == "sliding_window"}
    text = HF_DEFAULTS[model_type] | given
    _refuse_hf_features(text, model_type)
    sizes = _hf_sizes(text)
    eos = _merge_ids((generation_config or {}).get("eos_token_id"), text.get("eos_token_id"))
    is_gemma = model_type == "gemma3_text"
    window = _hf_windows(text, model_type)
    theta, local_theta, scaling = _hf_rope(text, is_gemma)
    return ModelConfig(
        **sizes,
        **(_gemma3_fields(sizes["hidden_size"]) if is_gemma else {"family": "llama"}),
        **_sliding_fields(window, theta, local_theta, scaling, is_gemma),
        name=name or data.get("_name_or_path") or str(model_type),
        norm_eps=float(text["rms_norm_eps"]),
        tie_embeddings=bool(text.get("tie_word_embeddings", False)),
        qkv_bias=model_type == "qwen2",
        activation=_hf_activation(text),
        attention_scale=_hf_scale(text, sizes["head_dim"]) if is_gemma else None,
        attention_soft_cap=text.get("attn_logit_softcapping"),
        final_soft_cap=text.get("final_logit_softcapping"),
        eos_token_ids=eos,
        bos_token_id=text.get("bos_token_id"),
    )


_OUTER_KEYS = (
    "tie_word_embeddings", "eos_token_id", "bos_token_id", "quantization_config", "_name_or_path",
)  # fmt: skip


def _hf_sizes(text: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads"):  # fmt: skip
        if key not in text:
            raise ConfigError(f"config.json lacks {key}")
    heads = int(text["num_attention_heads"])
    return {
        "vocab_size": int(text["vocab_size"]),
        "hidden_size": int(text["hidden_size"]),
        "intermediate_size": int(text["intermediate_size"]),
        "num_layers": int(text["num_hidden_layers"]),
        "num_heads": heads,
        "num_kv_heads": int(text.get("num_key_value_heads", heads)),
        "head_dim": int(text.get("head_dim", int(text["hidden_size"]) // heads)),
        "max_model_len": int(text["max_position_embeddings"]),
    }


def _gemma3_fields(hidden_size: int) -> dict[str, Any]:
    return {
        "family": "gemma3",
        "qk_norm": True,
        "post_norms": True,
        "embed_scale": math.sqrt(hidden_size),
    }


def _sliding_fields(
    window: tuple[int | None, ...],
    theta: float,
    local_theta: float | None,
    scaling: RopeScaling | None,
    is_gemma: bool,
) -> dict[str, Any]:
    """Windows and rope together, for sliding layers rotate by a base of their own."""
    if not is_gemma:
        local_theta = theta if any(window) else None
        if scaling is not None and any(window):
            raise ConfigError("rope scaling together with a sliding window is not supported")
    return {
        "sliding_window": window,
        "rope_theta": theta,
        "rope_theta_local": local_theta,
        "rope_scaling": scaling,
    }


def _refuse_hf_features(text: Mapping[str, Any], model_type: str) -> None:
    for key in ("num_local_experts", "num_experts", "quantization_config"):
        if text.get(key):
            raise ConfigError(f"{key} in config.json: such checkpoints are not supported")
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if text.get(key):
            raise ConfigError(f"{key} is not supported for {model_type}")
    if float(text.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError("partial_rotary_factor other than 1 is not supported")


def _hf_scale(text: Mapping[str, Any], head_dim: int) -> float | None:
    scalar = float(text["query_pre_attn_scalar"])
    return None if scalar == head_dim else scalar**-0.5


def _hf_activation(text: Mapping[str, Any]) -> Activation:
    name = text.get("hidden_activation") or text.get("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation {name!r} is not supported")
    return ACTIVATIONS[name]


def _hf_windows(text: Mapping[str, Any], model_type: str) -> tuple[int | None, ...]:
    num_layers = int(text["num_hidden_layers"])
    window = text.get("sliding_window")
    if model_type == "llama" or window is None:
        return (None,) * num_layers
    if model_type == "qwen2" and not text.get("use_sliding_window", False):
        return (None,) * num_layers
    if layer_types := text.get("layer_types"):
        if unknown := set(layer_types) - {"full_attention", "sliding_attention"}:
            raise ConfigError(f"layer type {sorted(unknown)[0]!r} is not supported")
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    if model_type == "qwen2":
        first = int(text["max_window_layers"])
        return tuple(window if layer >= first else None for layer in range(num_layers))
    # transformers 5 writes the pattern, when it does, with a leading underscore.
    pattern = text.get("_sliding_window_pattern", text.get("sliding_window_pattern"))
    return expand_window(int(window), num_layers, pattern)


def _hf_rope(
    text: Mapping[str, Any], is_gemma: bool
) -> tuple[float, float | None, RopeScaling | None]:
    """(theta, local theta, scaling) of the layouts of transformers 4 and 5."""
    theta = float(text.get("rope_theta", 10000.0))
    local_theta = float(text["rope_local_base_freq"]) if is_gemma else None
    parameters = dict(text.get("rope_parameters") or {})
    if "full_attention" in parameters:
        local = dict(parameters.get("sliding_attention") or {})
        if _hf_rope_scaling(local) is not None:
            raise ConfigError("rope scaling on sliding layers is not supported")
        local_theta = float(local.get("rope_theta", local_theta or theta))
        parameters = dict(parameters["full_attention"])
    theta = float(parameters.get("rope_theta", theta))
    return theta, local_theta, _hf_rope_scaling(parameters or text.get("rope_scaling") or {})


def _hf_rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError("partial_rotary_factor other than 1 is not supported")
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_len=int(rope["original_max_position_embeddings"]),
        )
    raise ConfigError(f"rope type {kind!r} is not supported; supported: default, linear, llama3")


def _merge_ids(*sources: int | Sequence[int] | None) -> tuple[int, ...]:
    """All ids in order of first appearance; each source is one id, several, or None."""
    ids: dict[int, None] = {}
    for source in sources:
        if source is not None:
            ids |= dict.fromkeys([source] if isinstance(source, int) else source)
    return tuple(ids)


# ---------------------------------------------------------------- GGUF metadata

_GGUF_ARCHITECTURES = ("llama", "qwen2", "gemma3")


def from_gguf(
    metadata: Mapping[str, Any],
    *,
    name: str = "",
    vocab_size: int | None = None,
    tie_embeddings: bool | None = None,
    rope_factors: Sequence[float] | None = None,
) -> ModelConfig:
    """Read the metadata of a GGUF file (Python values under their GGUF keys).

    Args:
        metadata: key to value, for example `{"general.architecture": "llama", ...}`.
        name: what to call the model; by default `general.name`.
        vocab_size: rows of the embedding; by default what the metadata says.
        tie_embeddings: whether the file has no `output.weight`; by default Gemma's habit.
        rope_factors: the values of `rope_freqs.weight` (float [head_dim / 2]), where GGUF
            keeps Llama 3.1's frequency scaling.

    Raises:
        ConfigError: the architecture, or a feature that it asks for, is not supported.
    """
    arch = metadata.get("general.architecture")
    if arch not in _GGUF_ARCHITECTURES:
        raise ConfigError(
            f"GGUF architecture {arch!r} is not supported; "
            f"supported: {', '.join(_GGUF_ARCHITECTURES)}"
        )
    reader = _GgufKeys(metadata, arch)
    if reader.get("expert_count"):
        raise ConfigError("mixture-of-experts GGUF files are not supported")
    sizes = _gguf_sizes(reader, vocab_size)
    is_gemma = arch == "gemma3"
    theta = float(reader.get("rope.freq_base", 1e6 if is_gemma else 1e4))
    local_theta = float(reader.get("rope.freq_base_swa", 1e4)) if is_gemma else None
    scaling = _gguf_rope_scaling(reader, rope_factors, sizes["head_dim"], theta)
    window = reader.get("attention.sliding_window")
    windows = (None,) * sizes["num_layers"]
    if window:
        pattern = int(reader.get("attention.sliding_window_pattern", 6)) if is_gemma else None
        windows = expand_window(int(window), sizes["num_layers"], pattern)
    # llama.cpp's rule too: GGUF has no key for it and only the 27B (62 layers) differs.
    wide = is_gemma and sizes["num_layers"] == 62
    return ModelConfig(
        **sizes,
        **(_gemma3_fields(sizes["hidden_size"]) if is_gemma else {"family": "llama"}),
        **_sliding_fields(windows, theta, local_theta, scaling, is_gemma),
        name=name or str(metadata.get("general.name", arch)),
        norm_eps=_round_float32(reader.require("attention.layer_norm_rms_epsilon")),
        tie_embeddings=is_gemma if tie_embeddings is None else tie_embeddings,
        qkv_bias=arch == "qwen2",
        activation="gelu_tanh" if is_gemma else "silu",
        attention_scale=(sizes["hidden_size"] / sizes["num_heads"]) ** -0.5 if wide else None,
        final_soft_cap=reader.get("final_logit_softcapping") or None,
        attention_soft_cap=reader.get("attn_logit_softcapping") or None,
        eos_token_ids=_merge_ids(
            *(metadata.get(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot", "eom"))
        ),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
    )


@dataclasses.dataclass(frozen=True)
class _GgufKeys:
    metadata: Mapping[str, Any]
    arch: str

    def get(self, key: str, default: Any = None) -> Any:
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(value, list | tuple):  # per-layer values: fine while all are the same
            if len(set(value)) != 1:
                raise ConfigError(f"{self.arch}.{key} differs by layer, which is not supported")
            return value[0]
        return value

    def require(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ConfigError(f"GGUF metadata lacks {self.arch}.{key}")
        return value


def _gguf_sizes(reader: _GgufKeys, vocab_size: int | None) -> dict[str, Any]:
    heads = int(reader.require("attention.head_count"))
    hidden_size = int(reader.require("embedding_length"))
    rotated = reader.get("rope.dimension_count")
    head_dim = int(reader.get("attention.key_length", rotated or hidden_size // heads))
    if int(reader.get("attention.value_length", head_dim)) != head_dim:
        raise ConfigError("GGUF with values of another size than keys is not supported")
    if rotated is not None and int(rotated) != head_dim:
        raise ConfigError(
            f"rotary embedding of {rotated} of {head_dim} dimensions is not supported"
        )
    if vocab_size is None:
        vocab_size = reader.get("vocab_size") or len(
            reader.metadata.get("tokenizer.ggml.tokens", ())
        )
    if not vocab_size:
        raise ConfigError("GGUF metadata does not tell the vocabulary's size")
    return {
        "vocab_size": int(vocab_size),
        "hidden_size": hidden_size,
        "intermediate_size": int(reader.require("feed_forward_length")),
        "num_layers": int(reader.require("block_count")),
        "num_heads": heads,
        "num_kv_heads": int(reader.get("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "max_model_len": int(reader.require("context_length")),
    }


def _gguf_rope_scaling(
    reader: _GgufKeys, factors: Sequence[float] | None, head_dim: int, theta: float
) -> RopeScaling | None:
    kind = reader.get("rope.scaling.type", "none")
    factor = float(reader.get("rope.scaling.factor", reader.get("rope.scale_linear", 1.0)))
    if factors is not None:
        return _match_llama3_factors(factors, head_dim, theta)
    if kind == "linear" or (kind == "none" and factor != 1.0):
        return RopeScaling(kind="linear", factor=factor) if factor != 1.0 else None
    if kind == "none":
        return None
    raise ConfigError(f"rope type {kind!r} is not supported; supported: none, linear, llama3")


def _match_llama3_factors(
    factors: Sequence[float], head_dim: int, theta: float
) -> RopeScaling | None:
    """Find Llama 3.1's scaling whose per-frequency divisors are `factors`.

    GGUF stores the divisors and not what they come from; the published Llama 3.x models differ
    in `factor` alone, so one candidate is built from the largest divisor and checked.
    """
    scaling = RopeScaling(kind="llama3", factor=float(max(factors)))
    if math.isclose(scaling.factor, 1.0):
        return None
    low = scaling.original_max_len / scaling.low_freq_factor
    high = scaling.original_max_len / scaling.high_freq_factor
    for i, found in enumerate(factors):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        blend = (scaling.original_max_len / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        expected = 1 / ((1 - blend) / scaling.factor + blend)
        expected = 1.0 if wavelength < high else scaling.factor if wavelength > low else expected
        if not math.isclose(found, expected, rel_tol=1e-3):
            raise ConfigError("rope_freqs.weight is not the frequency scaling of Llama 3.1")
    return scaling


def _round_float32(value: float) -> float:
    """Undo the widening of a float32: 1e-05, and not 9.999999747378752e-06."""
    return float(f"{value:.6g}")
