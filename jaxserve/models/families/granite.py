"""Granite 3 (dense): Llama with a multiplier of its own in each place."""

from jaxserve.models import hf_fields
from jaxserve.models.config_keys import GGUF_COMMON, HF_COMMON
from jaxserve.models.config_values import ConfigValues
from jaxserve.models.decoder import Layer
from jaxserve.models.families.llama import gguf_decoder, parameters
from jaxserve.models.family import Family, Fields, GgufFormat, HfFormat


def _hf(values: ConfigValues, sizes: Fields) -> Fields:
    return {
        "embed_scale": values.positive("embedding_multiplier", 1.0),
        "attention_scale": values.positive("attention_multiplier", 1.0),
        "residual_scale": values.positive("residual_multiplier", 1.0),
        "logit_scale": 1 / values.positive("logits_scaling", 1.0),
        **hf_fields.biases(values),
        **hf_fields.rope(values, sizes),
    }


def _gguf(values: ConfigValues, sizes: Fields, rope_factors: list[float] | None) -> Fields:
    def scale(name: str) -> float:
        return values.number(name, 0.0, least=0) or 1.0  # llama.cpp's rule: 0 is none

    return {
        **gguf_decoder(values, sizes, rope_factors),
        "embed_scale": scale("embedding_scale"),
        "attention_scale": values.number("attention.scale", 0.0, least=0) or None,
        "residual_scale": scale("residual_scale"),
        "logit_scale": 1 / scale("logit_scale"),
    }


FAMILY = Family(
    name="granite",
    parameters=parameters,
    layer=Layer,
    hf={
        "granite": HfFormat(
            keys=HF_COMMON.plus(
                read=(
                    "embedding_multiplier", "attention_multiplier", "residual_multiplier",
                    "logits_scaling", "attention_bias", "mlp_bias",
                ),
                classes=("GraniteForCausalLM", "GraniteModel"),
            ),
            defaults={
                "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": 1,
                "eos_token_id": 2,
            },
            fields=_hf,
        ),
    },
    gguf={
        "granite": GgufFormat(
            keys=GGUF_COMMON.plus(
                read=("embedding_scale", "attention.scale", "residual_scale", "logit_scale"),
            ),
            fields=_gguf,
        ),
    },
)  # fmt: skip
