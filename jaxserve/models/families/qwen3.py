"""The Qwen 3 family (dense): Llama with norms of each head's queries and keys."""

from jaxserve.models import hf_fields
from jaxserve.models.config_keys import GGUF_COMMON, HF_COMMON
from jaxserve.models.config_values import ConfigValues
from jaxserve.models.decoder import Layer
from jaxserve.models.families.llama import gguf_decoder, pre_norm_parameters
from jaxserve.models.families.qwen2 import qwen_windows
from jaxserve.models.family import Family, Fields, GgufFormat, HfFormat


def _hf(values: ConfigValues, sizes: Fields) -> Fields:
    return {
        "qk_norm": True,
        **hf_fields.biases(values),
        **hf_fields.rope(values, sizes),
        **qwen_windows(values, sizes),
    }


def _gguf(values: ConfigValues, sizes: Fields, rope_factors: list[float] | None) -> Fields:
    return {"qk_norm": True, **gguf_decoder(values, sizes, rope_factors)}


FAMILY = Family(
    name="qwen3",
    parameters=pre_norm_parameters,
    layer=Layer,
    hf={
        "qwen3": HfFormat(
            keys=HF_COMMON.plus(
                read=(
                    "attention_bias", "sliding_window", "use_sliding_window", "max_window_layers",
                    "layer_types",
                ),
                classes=("Qwen3ForCausalLM", "Qwen3Model"),
            ),
            defaults={
                "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "sliding_window": 4096,
                "num_key_value_heads": 32, "max_window_layers": 28, "head_dim": 128,
            },
            fields=_hf,
        ),
    },
    gguf={"qwen3": GgufFormat(keys=GGUF_COMMON, fields=_gguf)},
)  # fmt: skip
