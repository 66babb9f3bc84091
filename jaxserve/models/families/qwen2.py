"""The Qwen 2 family (Qwen2, Qwen2.5, Qwen2.5-Coder): Llama with biases of Q, K and V."""

from jaxserve.models import hf_fields
from jaxserve.models.config_keys import GGUF_COMMON, HF_COMMON
from jaxserve.models.config_values import ConfigValues
from jaxserve.models.decoder import Layer
from jaxserve.models.families.llama import gguf_decoder, pre_norm_parameters
from jaxserve.models.family import Family, Fields, GgufFormat, HfFormat


def qwen_windows(values: ConfigValues, sizes: Fields) -> Fields:
    """Windows by layer, of which the first `max_window_layers` have none."""
    layers = sizes["num_layers"]
    window = None
    if values.flag("use_sliding_window", False):
        window = values.integer("sliding_window", None)
    fields = hf_fields.windows(values, sizes, window)
    if window and not values.sequence("layer_types"):
        first = values.integer("max_window_layers", least=0)
        fields = {"sliding_window": tuple(window if n >= first else None for n in range(layers))}
    return fields


def _hf(values: ConfigValues, sizes: Fields) -> Fields:
    return {"qkv_bias": True, **hf_fields.rope(values, sizes), **qwen_windows(values, sizes)}


def _gguf(values: ConfigValues, sizes: Fields, rope_factors: list[float] | None) -> Fields:
    return {"qkv_bias": True, **gguf_decoder(values, sizes, rope_factors)}


FAMILY = Family(
    name="qwen2",
    parameters=pre_norm_parameters,
    layer=Layer,
    hf={
        "qwen2": HfFormat(
            keys=HF_COMMON.plus(
                read=("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
                classes=("Qwen2ForCausalLM", "Qwen2Model"),
            ),
            defaults={
                "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "sliding_window": 4096,
                "num_key_value_heads": 32, "max_window_layers": 28,
            },
            fields=_hf,
        ),
    },
    gguf={"qwen2": GgufFormat(keys=GGUF_COMMON, fields=_gguf)},
)  # fmt: skip
