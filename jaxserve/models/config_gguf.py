"""Reads a `ModelConfig` from the metadata of a GGUF file."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.core.errors import ConfigError
from jaxserve.models.config import MAX_LAYERS, ModelConfig, RopeScaling
from jaxserve.models.config_keys import GGUF_KEYS, check_keys
from jaxserve.models.config_readers import expand_window, gemma3_fields, sliding_fields
from jaxserve.models.config_values import ConfigValues

_WHERE = "GGUF metadata"


def from_gguf(
    metadata: Mapping[str, Any],
    *,
    name: str = "",
    vocab_size: int | None = None,
    tie_embeddings: bool | None = None,
    rope_factors: Sequence[float] | None = None,
    allow_unknown: bool = False,
) -> ModelConfig:
    """Read the metadata of a GGUF file (Python values under their GGUF keys).

    Args:
        metadata: key to value, for example `{"general.architecture": "llama", ...}`.
        name: what to call the model; by default `general.name`.
        vocab_size: rows of the embedding; by default what the metadata says.
        tie_embeddings: whether the file has no `output.weight`; by default Gemma's habit.
        rope_factors: the values of `rope_freqs.weight` (float [head_dim / 2]), where GGUF
            keeps Llama 3.1's frequency scaling.
        allow_unknown: go on with keys that are not known, see `check_keys`.

    Raises:
        ConfigError: the architecture, or a feature that it asks for, is not supported.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in GGUF_KEYS:
        raise ConfigError(
            f"GGUF architecture {arch!r} is not supported; supported: {', '.join(GGUF_KEYS)}"
        )
    values = _of_architecture(metadata, arch, allow_unknown)
    sizes = _sizes(values, metadata, vocab_size)
    is_gemma = arch == "gemma3"
    theta = values.positive("rope.freq_base", 1e6 if is_gemma else 1e4)
    local_theta = values.positive("rope.freq_base_swa", 1e4) if is_gemma else None
    scaling = _rope_scaling(values, rope_factors, sizes["head_dim"], theta)
    windows: tuple[int | None, ...] = (None,) * sizes["num_layers"]
    if window := values.integer("attention.sliding_window", 0, least=0):
        pattern = values.integer("attention.sliding_window_pattern", 6) if is_gemma else None
        windows = expand_window(window, sizes["num_layers"], pattern)
    # llama.cpp's rule too: GGUF has no key for it and only the 27B (62 layers) differs.
    wide = is_gemma and sizes["num_layers"] == 62
    tokens = ConfigValues(metadata, _WHERE, "tokenizer.ggml.")
    bos = tokens.token_ids("bos_token_id")
    ends = [i for kind in ("eos", "eot", "eom") for i in tokens.token_ids(f"{kind}_token_id")]
    return ModelConfig(
        **sizes,
        **(gemma3_fields(sizes["hidden_size"]) if is_gemma else {"family": "llama"}),
        **sliding_fields(windows, theta, local_theta, scaling, is_gemma),
        name=name or str(metadata.get("general.name", arch)),
        norm_eps=_round_float32(values.number("attention.layer_norm_rms_epsilon", least=0)),
        tie_embeddings=is_gemma if tie_embeddings is None else tie_embeddings,
        qkv_bias=arch == "qwen2",
        activation="gelu_tanh" if is_gemma else "silu",
        attention_scale=(sizes["hidden_size"] / sizes["num_heads"]) ** -0.5 if wide else None,
        final_soft_cap=values.number("final_logit_softcapping", None) or None,
        attention_soft_cap=values.number("attn_logit_softcapping", None) or None,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        bos_token_id=bos[0] if bos else None,
    )


def _of_architecture(metadata: Mapping[str, Any], arch: str, allow_unknown: bool) -> ConfigValues:
    """The architecture's own keys, checked, without its name before each."""
    own: dict[str, Any] = {}
    for key, value in metadata.items():
        if not key.startswith(f"{arch}."):
            continue
        if isinstance(value, list | tuple):  # per-layer values: fine while all are the same
            if any(item != value[0] for item in value[1:]):
                raise ConfigError(f"{key} differs by layer, which is not supported")
            value = value[0] if value else None
        own[key.removeprefix(f"{arch}.")] = value
    check_keys(own, GGUF_KEYS[arch], f"{_WHERE} of {arch}", allow_unknown=allow_unknown)
    return ConfigValues({f"{arch}.{key}": value for key, value in own.items()}, _WHERE, f"{arch}.")


def _sizes(
    values: ConfigValues, metadata: Mapping[str, Any], vocab_size: int | None
) -> dict[str, Any]:
    heads, hidden_size = values.integer("attention.head_count"), values.integer("embedding_length")
    rotated = values.integer("rope.dimension_count", None)
    head_dim = values.integer("attention.key_length", rotated or hidden_size // heads)
    if values.integer("attention.value_length", head_dim) != head_dim:
        raise ConfigError("GGUF with values of another size than keys is not supported")
    if rotated is not None and rotated != head_dim:
        raise ConfigError(
            f"rotary embedding of {rotated} of {head_dim} dimensions is not supported"
        )
    if vocab_size is None:
        tokens = ConfigValues(metadata, _WHERE).sequence("tokenizer.ggml.tokens")
        vocab_size = values.integer("vocab_size", len(tokens))
    if not vocab_size:
        raise ConfigError("GGUF metadata does not tell the vocabulary's size")
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": values.integer("feed_forward_length"),
        "num_layers": values.integer("block_count", most=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": values.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_model_len": values.integer("context_length"),
    }


def _rope_scaling(
    values: ConfigValues, factors: Sequence[float] | None, head_dim: int, theta: float
) -> RopeScaling | None:
    kind = values.text("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ConfigError(f"rope type {kind!r} is not supported; supported: none, linear, llama3")
    factor = values.number("rope.scaling.factor", values.number("rope.scale_linear", 0.0), least=0)
    factor = factor or 1.0  # llama.cpp's rule: 0 is none
    if factors is None:
        return RopeScaling(kind="linear", factor=factor) if factor != 1.0 else None
    if factor != 1.0:
        raise ConfigError("rope.scaling.factor beside rope_freqs.weight is not supported")
    if not factors or not all(0 < divisor < math.inf for divisor in factors):
        raise ConfigError("rope_freqs.weight must hold positive numbers")
    return _scaling_of(factors, head_dim, theta)


def _scaling_of(factors: Sequence[float], head_dim: int, theta: float) -> RopeScaling | None:
    """The scaling whose per-frequency divisors are `factors`.

    GGUF stores the divisors and not what they come from. The published Llama 3.x models differ in
    `factor` alone, so theirs is found from the largest divisor; any others are taken as they are.
    """
    if all(math.isclose(divisor, 1.0) for divisor in factors):
        return None
    scaling = RopeScaling(kind="llama3", factor=max(1.0, *factors))
    expected = _llama3_divisors(scaling, head_dim, theta)
    if len(factors) == len(expected) and all(
        math.isclose(*pair, rel_tol=1e-3) for pair in zip(factors, expected, strict=True)
    ):
        return scaling
    return RopeScaling(kind="divisors", factor=max(factors), divisors=tuple(factors))


def _llama3_divisors(scaling: RopeScaling, head_dim: int, theta: float) -> list[float]:
    low = scaling.original_max_len / scaling.low_freq_factor
    high = scaling.original_max_len / scaling.high_freq_factor
    divisors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        blend = (scaling.original_max_len / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        between = 1 / ((1 - blend) / scaling.factor + blend) if high <= wavelength <= low else 1.0
        divisors.append(scaling.factor if wavelength > low else between)
    return divisors


def _round_float32(value: float) -> float:
    """Undo the widening of a float32: 1e-05, and not 9.999999747378752e-06."""
    return float(f"{value:.6g}")
