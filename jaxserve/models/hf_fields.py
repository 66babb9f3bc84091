"""Fields of `ModelConfig` that families read from a `config.json` in the same way."""

import math
from collections.abc import Sequence
from typing import Any

from jaxserve.core.errors import ConfigError
from jaxserve.models.config import MAX_LAYERS, Activation, RopeScaling
from jaxserve.models.config_keys import ROPE_KEYS, check_keys
from jaxserve.models.config_values import ConfigValues, expand_window

Fields = dict[str, Any]

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
LAYER_TYPES = ("full_attention", "sliding_attention")


def sizes(values: ConfigValues) -> Fields:
    """The sizes that every decoder has."""
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


def activation(values: ConfigValues) -> Activation:
    """The MLP's activation.

    Raises:
        ConfigError: it is not one that layers compute.
    """
    name = values.text("hidden_activation", values.text("hidden_act", "silu"))
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation {name!r} is not supported")
    return ACTIVATIONS[name]


def matryoshka(values: ConfigValues) -> tuple[int, ...] | None:
    """Sizes to which embeddings may be cut, by vLLM's two keys.

    Raises:
        ConfigError: a size is no positive number.
    """
    found = tuple(values.sequence("matryoshka_dimensions"))
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in found):
        raise ConfigError(f"{values.where}: matryoshka_dimensions must be positive whole numbers")
    return found if found or values.flag("is_matryoshka", False) else None


def check_layer_types(values: ConfigValues, supported: Sequence[str]) -> Sequence[str]:
    """The kinds of the layers, in order; nothing where the file does not say.

    Raises:
        ConfigError: one of them is none of those supported.
    """
    kinds = values.sequence("layer_types")
    for kind in kinds:
        if kind not in supported:
            raise ConfigError(
                f"{values.where}: layer_types other than {', '.join(supported)} are not "
                f"supported: {kind!r}"
            )
    return kinds


def windows(values: ConfigValues, sizes: Fields, window: int | None) -> Fields:
    """Attention windows by layer, from `layer_types` or a pattern; all slide without either.

    Raises:
        ConfigError: a layer is of another kind.
    """
    kinds = check_layer_types(values, LAYER_TYPES)
    if window is None:
        return {}
    if kinds:
        sliding = tuple(window if kind == "sliding_attention" else None for kind in kinds)
        return {"sliding_window": sliding}
    # transformers 5 writes the pattern, when it does, with a leading underscore.
    pattern = values.integer("sliding_window_pattern", None)
    pattern = values.integer("_sliding_window_pattern", pattern)
    return {"sliding_window": expand_window(window, sizes["num_layers"], pattern)}


def biases(values: ConfigValues) -> Fields:
    """Biases of Q, K, V and O by one key, of the MLP by another."""
    attention = values.flag("attention_bias", False)
    mlp = values.flag("mlp_bias", False)
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": mlp}


def rope(
    values: ConfigValues,
    sizes: Fields,
    *,
    local_theta: float | None = None,
    partial: float | None = None,
) -> Fields:
    """Rotary embeddings, in the layouts of transformers 4 and 5.

    Args:
        values: the configuration.
        sizes: the model's.
        local_theta: base of sliding layers, where the file has no parameters for them; None:
            they rotate as the others do.
        partial: what part of each head rotates, where the file does not say; None: all of it, and
            a file that says otherwise is refused.

    Raises:
        ConfigError: a kind of scaling is not supported, or is asked of sliding layers only.
    """
    theta = values.positive("rope_theta", 10000.0)
    parameters = values.mapping("rope_parameters")
    if parameters.get("full_attention") is not None:
        local = parameters.mapping("sliding_attention")
        if _scaling(local, values, sizes) is not None:
            raise ConfigError("rope scaling on sliding layers is not supported")
        local_theta = local.positive("rope_theta", local_theta or theta)
        parameters = parameters.mapping("full_attention")
    theta = parameters.positive("rope_theta", theta)
    found = parameters if parameters.values else values.mapping("rope_scaling")
    fields = {
        "rope_theta": theta,
        "rope_theta_local": local_theta,
        "rope_scaling": _scaling(found, values, sizes, is_partial=partial is not None),
    }
    if partial is not None:
        part = found.positive(
            "partial_rotary_factor", values.positive("partial_rotary_factor", partial)
        )
        fields["rotary_dim"] = int(sizes["head_dim"] * part) if part != 1 else None
    return fields


def _scaling(
    rope: ConfigValues, values: ConfigValues, sizes: Fields, *, is_partial: bool = False
) -> RopeScaling | None:
    kind = rope.text("rope_type", rope.text("type", "default"))
    kind = "longrope" if kind == "su" else kind  # what Phi 3 called it first
    if kind not in ROPE_KEYS:
        raise ConfigError(f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_KEYS)}")
    keys = ROPE_KEYS[kind].plus(read=("partial_rotary_factor",) if is_partial else ())
    check_keys(rope.values, keys, rope.where, allow_unknown=rope.allow_unknown)
    trained = values.integer("original_max_position_embeddings", sizes["max_model_len"])
    original = rope.integer("original_max_position_embeddings", trained)
    # `dynamic` changes nothing within `max_position_embeddings`, and no more than that is served.
    if kind in ("default", "dynamic"):
        return None
    if kind == "yarn":
        return _yarn(rope, original, sizes["max_model_len"] / original)
    if kind == "longrope":
        return _longrope(rope, original, sizes["max_model_len"] / original)
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


def _yarn(rope: ConfigValues, original: int, factor: float) -> RopeScaling:
    """YaRN's scaling; `factor` is used where the file gives none.

    DeepSeek's two scales of the attention factor stand in for it, where both are given.
    """
    factor = rope.positive("factor", factor)
    scales = [rope.number(name, 0.0) for name in ("mscale", "mscale_all_dim")]
    above, below = (max(1.0, 1 + 0.1 * scale * math.log(factor)) for scale in scales)
    attention = above / below if all(scales) else max(1.0, 1 + 0.1 * math.log(factor))
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_len=original,
        beta_fast=rope.positive("beta_fast", 32.0),
        beta_slow=rope.positive("beta_slow", 1.0),
        whole_betas=rope.flag("truncate", True),
        attention_factor=rope.positive("attention_factor", attention),
    )


def _longrope(rope: ConfigValues, original: int, factor: float) -> RopeScaling:
    """LongRoPE's scaling: a divisor for each frequency, others for contexts that need no more."""
    factor = rope.positive("factor", factor)
    long, short = (tuple(rope.sequence(f"{kind}_factor")) for kind in ("long", "short"))
    if not long or len(long) != len(short):
        raise ConfigError(f"{rope.where}: longrope takes as many long_factor as short_factor")
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeScaling(
        kind="divisors",
        factor=max(long),
        divisors=long,
        short_divisors=short,
        original_max_len=original,
        attention_factor=rope.positive("attention_factor", attention),
    )
