"""Gemma 2: Gemma 3's norms, soft caps, and every second layer with a window."""

from jaxserve.models import gguf_fields, hf_fields
from jaxserve.models.config_keys import GGUF_COMMON, HF_COMMON
from jaxserve.models.config_values import ConfigValues
from jaxserve.models.decoder import Layer
from jaxserve.models.families.gemma3 import gemma_fields, parameters
from jaxserve.models.family import Family, Fields, GgufFormat, HfFormat

PATTERN = 2
WIDE_LAYERS = 46  # of the 27B, whose queries alone are scaled by another size than a head's


def _hf(values: ConfigValues, sizes: Fields) -> Fields:
    return {
        **gemma_fields(sizes, values.positive("query_pre_attn_scalar")),
        **hf_fields.rope(values, sizes),
        **hf_fields.windows(values, sizes, values.integer("sliding_window", None)),
        "attention_soft_cap": values.positive("attn_logit_softcapping", None),
        "final_soft_cap": values.positive("final_logit_softcapping", None),
    }


def _gguf(values: ConfigValues, sizes: Fields, rope_factors: list[float] | None) -> Fields:
    # llama.cpp's rule too: GGUF has no key for it.
    is_wide = sizes["num_layers"] == WIDE_LAYERS
    scalar = sizes["hidden_size"] / sizes["num_heads"] if is_wide else sizes["head_dim"]
    return {
        **gemma_fields(sizes, scalar),
        **gguf_fields.rope(values, sizes, rope_factors),
        **gguf_fields.windows(values, sizes, PATTERN),
        **gguf_fields.soft_caps(values),
        "activation": "gelu_tanh",
    }


FAMILY = Family(
    name="gemma2",
    parameters=parameters,
    layer=Layer,
    hf={
        "gemma2": HfFormat(
            keys=HF_COMMON.plus(
                read=(
                    "hidden_activation", "query_pre_attn_scalar", "sliding_window", "layer_types",
                    "attn_logit_softcapping", "final_logit_softcapping",
                ),
                harmless=("sliding_window_size",),
                classes=("Gemma2ForCausalLM", "Gemma2Model"),
            ),
            defaults={
                "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
                "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
                "head_dim": 256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
                "query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True,
                "sliding_window_pattern": PATTERN, "hidden_activation": "gelu_pytorch_tanh",
                "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
                "eos_token_id": 1, "bos_token_id": 2,
            },
            fields=_hf,
        ),
    },
    gguf={"gemma2": GgufFormat(keys=GGUF_COMMON, fields=_gguf)},
)  # fmt: skip
