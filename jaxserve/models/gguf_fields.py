"""Fields of `ModelConfig` that families read from GGUF metadata in the same way."""

import math
from collections.abc import Sequence
from typing import Any

from jaxserve.core.errors import ConfigError
from jaxserve.models.config import RopeScaling
from jaxserve.models.config_values import ConfigValues, expand_window

Fields = dict[str, Any]


def soft_caps(values: ConfigValues) -> Fields:
    """Caps of logits and of attention scores; 0 is none."""
    return {
        "final_soft_cap": values.number("final_logit_softcapping", None) or None,
        "attention_soft_cap": values.number("attn_logit_softcapping", None) or None,
    }


def windows(values: ConfigValues, sizes: Fields, pattern: int | None = None) -> Fields:
    """Attention windows by layer; every `pattern`-th layer (None: no layer) attends fully."""
    window = values.integer("attention.sliding_window", 0, least=0)
    if not window:
        return {}
    return {"sliding_window": expand_window(window, sizes["num_layers"], pattern)}


def rope(
    values: ConfigValues,
    sizes: Fields,
    factors: Sequence[float] | None,
    *,
    theta: float = 1e4,
    is_partial: bool = False,
) -> Fields:
    """Rotary embeddings.

    Args:
        values: the architecture's keys.
        sizes: the model's.
        factors: the numbers of `rope_freqs.weight`.
        theta: the base where the file does not say.
        is_partial: whether a part of each head may rotate, and not all of it.

    Raises:
        ConfigError: a kind of scaling is not supported, or two are given, or a part rotates.
    """
    if sizes["rotary_dim"] is not None and not is_partial:
        raise ConfigError(
            f"rotary embedding of {sizes['rotary_dim']} of {sizes['head_dim']} dimensions is not "
            "supported"
        )
    theta = values.positive("rope.freq_base", theta)
    return {
        "rope_theta": theta,
        "rope_scaling": _scaling(values, factors, sizes, theta),
    }


def _scaling(
    values: ConfigValues, factors: Sequence[float] | None, sizes: Fields, theta: float
) -> RopeScaling | None:
    kind = values.text("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn") and not (kind == "longrope" and factors):
        raise ConfigError(f"rope type {kind!r} is not supported; supported: none, linear, yarn")
    factor = values.number("rope.scaling.factor", values.number("rope.scale_linear", 0.0), least=0)
    factor = factor or 1.0  # llama.cpp's rule: 0 is none
    if kind == "yarn" and factors is None and factor > 1:
        return RopeScaling(
            kind="yarn",
            factor=factor,
            original_max_len=values.integer(
                "rope.scaling.original_context_length", sizes["max_model_len"]
            ),
            beta_fast=values.positive("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=values.positive("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=1 + 0.1 * math.log(factor),
        )
    if factors is None:
        return RopeScaling(kind="linear", factor=factor) if factor != 1.0 else None
    if factor != 1.0:
        raise ConfigError("rope.scaling.factor beside rope_freqs.weight is not supported")
    if not factors or not all(0 < divisor < math.inf for divisor in factors):
        raise ConfigError("rope_freqs.weight must hold positive numbers")
    return _scaling_of(factors, sizes["rotary_dim"] or sizes["head_dim"], theta)


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
