"""GLM 4 (dense, of April 2025): norms before and after each block, half of each head rotating."""

from jaxserve.models import gguf_fields, hf_fields
from jaxserve.models import parameters as declare
from jaxserve.models.config import ModelConfig
from jaxserve.models.config_keys import GGUF_COMMON, HF_COMMON
from jaxserve.models.config_values import ConfigValues
from jaxserve.models.decoder import Layer
from jaxserve.models.family import Family, Fields, GgufFormat, HfFormat
from jaxserve.models.parameters import Format, Parameter, Place

BOTH: tuple[Format, ...] = ("hf", "gguf")


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Parameters of a GLM 4, whose rotary embeddings are interleaved."""
    size = config.hidden_size

    def layer(at: Place) -> dict[str, Parameter]:
        hf, gguf = at
        return {
            "attention_norm": declare.norm(size, f"{hf}input_layernorm", f"{gguf}attn_norm"),
            **declare.attention(config, at, interleaved=BOTH),
            "post_attention_norm": declare.norm(
                size, f"{hf}post_self_attn_layernorm", f"{gguf}post_attention_norm"
            ),
            "mlp_norm": declare.norm(size, f"{hf}post_attention_layernorm", f"{gguf}ffn_norm"),
            **declare.gated_mlp(config, at, fused=BOTH),
            "post_mlp_norm": declare.norm(size, f"{hf}post_mlp_layernorm", f"{gguf}post_ffw_norm"),
        }

    return declare.model_parameters(config, layer, declare.norm(size, "model.norm", "output_norm"))


def _hf(values: ConfigValues, sizes: Fields) -> Fields:
    return {
        "qkv_bias": values.flag("attention_bias", True),
        **hf_fields.rope(values, sizes, partial=0.5),
    }


def _gguf(values: ConfigValues, sizes: Fields, rope_factors: list[float] | None) -> Fields:
    return {"qkv_bias": True, **gguf_fields.rope(values, sizes, rope_factors, is_partial=True)}


FAMILY = Family(
    name="glm4",
    parameters=parameters,
    layer=Layer,
    hf={
        "glm4": HfFormat(
            keys=HF_COMMON.plus(
                read=("attention_bias", "partial_rotary_factor"),
                classes=("Glm4ForCausalLM", "Glm4Model"),
            ),
            defaults={
                "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696,
                "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2,
                "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-7,
            },
            fields=_hf,
        ),
    },
    gguf={"glm4": GgufFormat(keys=GGUF_COMMON, fields=_gguf)},
)  # fmt: skip
