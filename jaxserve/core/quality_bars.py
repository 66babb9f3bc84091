"""What formats may cost in quality, and what they did cost where that was measured.

Perplexity, as a part of what it is in float32. `jaxserve bench quality` measures it for any model.
"""

from collections.abc import Mapping

# The options that choose a format, in the order in which `bench quality` names a side.
OPTIONS = ("quantization", "activation_dtype", "kv_cache_dtype")
MODEL = "SmolLM2-135M, whose weights were quantised before"  # that was measured

_EIGHT_BITS = 0.005
_BARS = {
    ("quantization", "int8"): _EIGHT_BITS,
    ("quantization", "fp8"): _EIGHT_BITS,
    ("quantization", "int4"): 0.04,
    ("activation_dtype", "int8"): _EIGHT_BITS,
    ("kv_cache_dtype", "bfloat16"): _EIGHT_BITS,
    ("kv_cache_dtype", "int8"): _EIGHT_BITS,
    ("kv_cache_dtype", "fp8"): _EIGHT_BITS,
}
# Each by itself; int8 activations beside int8 weights.
_MEASURED = {
    ("quantization", "int8"): 0.0026,
    ("quantization", "fp8"): 0.0385,
    ("quantization", "int4"): 0.208,
    ("activation_dtype", "int8"): 0.0391,
    ("kv_cache_dtype", "bfloat16"): 0.0001,
    ("kv_cache_dtype", "int8"): 0.0013,
    ("kv_cache_dtype", "fp8"): 0.0086,
}


def bar_of(options: Mapping[str, str]) -> float | None:
    """What a choice of formats may add to perplexity, as a part of it; None: nothing is said.

    Args:
        options: some of `OPTIONS` and their values; the coarsest of them counts.
    """
    bars = [_BARS[choice] for choice in options.items() if choice in _BARS]
    return max(bars, default=None)


def warnings(options: Mapping[str, str]) -> list[str]:
    """A sentence for every format chosen that has cost more than it may.

    Args:
        options: as of `bar_of`.
    """
    return [
        f"{choice[0]} {choice[1]} may cost quality: {100 * _MEASURED[choice]:.1f} % more "
        f"perplexity on {MODEL}, where {100 * _BARS[choice]:.1f} % were to be expected; see what "
        "it costs this model with `jaxserve bench quality`"
        for choice in options.items()
        if choice in _MEASURED and _MEASURED[choice] > _BARS[choice]
    ]
