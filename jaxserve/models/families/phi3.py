"""Phi 3 and Phi 4: Llama with fused tensors, part of each head rotating, and LongRoPE."""

import dataclasses

from jaxserve.models import gguf_fields, hf_fields
from jaxserve.models.config import ModelConfig
from jaxserve.models.config_keys import GGUF_COMMON, HF_COMMON
from jaxserve.models.config_values import ConfigValues
from jaxserve.models.decoder import Layer
from jaxserve.models.families.llama import pre_norm_parameters
from jaxserve.models.family import Family, Fields, GgufFormat, HfFormat
from jaxserve.models.parameters import Parameter


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Parameters of a Phi 3 or 4, which every format holds fused."""
    return pre_norm_parameters(config, fused=("hf", "gguf"))


def _hf(values: ConfigValues, sizes: Fields) -> Fields:
    window = values.integer("sliding_window", None)
    return {
        **hf_fields.rope(values, sizes, partial=1.0),
        **hf_fields.windows(values, sizes, window),
    }


def _gguf(values: ConfigValues, sizes: Fields, rope_factors: list[float] | None) -> Fields:
    rope = gguf_fields.rope(values, sizes, rope_factors, is_partial=True)
    if scaling := rope["rope_scaling"]:
        original = values.integer("rope.scaling.original_context_length", sizes["max_model_len"])
        factor = values.number("rope.scaling.attn_factor", 0.0, least=0) or 1.0
        rope["rope_scaling"] = dataclasses.replace(
            scaling, attention_factor=factor, original_max_len=original
        )
    return {**rope, **gguf_fields.windows(values, sizes)}


FAMILY = Family(
    name="phi3",
    parameters=parameters,
    layer=Layer,
    hf={
        "phi3": HfFormat(
            # Their own code computes what transformers does.
            keys=HF_COMMON.plus(
                read=("sliding_window", "partial_rotary_factor"),
                harmless=("auto_map", "full_attn_mod", "interpolate_factor"),
                classes=("Phi3ForCausalLM", "Phi3Model"),
            ),
            defaults={
                "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 1,
                "eos_token_id": 32000,
            },
            fields=_hf,
        ),
    },
    gguf={
        "phi3": GgufFormat(keys=GGUF_COMMON.plus(read=("rope.scaling.attn_factor",)), fields=_gguf),
    },
)  # fmt: skip
