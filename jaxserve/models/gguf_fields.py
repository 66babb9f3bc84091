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
) -> Fields:
    """Rotary embeddings.

    Args:
        values: the architecture's keys.
        sizes: the model's.
        factors: the numbers of `rope_freqs.weight`.
        theta: the base where the file does not say.

    Raises:
        ConfigError: a kind of scaling is not supported, or two are given.
    """
    theta = values.positive("rope.freq_base", theta)
    return {
        "rope_theta": theta,
        "rope_scaling": _scaling(values, factors, sizes["head_dim"], theta),
    }


def _scaling(
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
