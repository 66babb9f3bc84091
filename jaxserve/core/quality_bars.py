"""What formats may cost in quality, and what they did cost where that was measured.

Perplexity, as a part of what it is in float32. `jaxserve bench quality` measures it for any model.
"""

from collections.abc import Mapping
from typing import NamedTuple

# The options that choose a format, in the order in which `bench quality` names a side.
OPTIONS = ("quantization", "activation_dtype", "kv_cache_dtype")
MODEL = "SmolLM2-135M, whose weights were quantised before"  # that was measured


class _Cost(NamedTuple):
    """What a format did cost, and what it may."""

    measured: float
    bar: float = 0.005


# Each by itself; int8 activations beside int8 weights.
_COSTS = {
    ("quantization", "int8"): _Cost(0.0026),
    ("quantization", "fp8"): _Cost(0.0385),
    ("quantization", "int4"): _Cost(0.208, bar=0.04),
    ("activation_dtype", "int8"): _Cost(0.0391),
    ("kv_cache_dtype", "bfloat16"): _Cost(0.0001),
    ("kv_cache_dtype", "int8"): _Cost(0.0013),
    ("kv_cache_dtype", "fp8"): _Cost(0.0086),
}


def bar_of(options: Mapping[str, str]) -> float | None:
    """What a choice of formats may add to perplexity, as a part of it; None: nothing is said.

    Args:
        options: some of `OPTIONS` and their values; the coarsest of them counts.
    """
    bars = [_COSTS[choice].bar for choice in options.items() if choice in _COSTS]
    return max(bars, default=None)


def quality_warnings(options: Mapping[str, str]) -> list[str]:
    """A sentence for every format chosen that has cost more than it may.

    Args:
        options: as of `bar_of`.
    """
    return [
        f"{name} {value} may cost quality: {100 * cost.measured:.1f} % more perplexity on {MODEL}, "
        f"where {100 * cost.bar:.1f} % were to be expected; see what it costs this model with "
        "`jaxserve bench quality`"
        for name, value in options.items()
        if (cost := _COSTS.get((name, value))) is not None and cost.measured > cost.bar
    ]
