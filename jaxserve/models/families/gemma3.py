"""Gemma 3 (text): norms before and after each part, qk-norm, local and global attention."""

import math

from jaxserve.models import gguf_fields, hf_fields
from jaxserve.models import parameters as declare
from jaxserve.models.config import ModelConfig
from jaxserve.models.config_keys import GGUF_COMMON, HF_COMMON
from jaxserve.models.config_values import ConfigValues
from jaxserve.models.decoder import Layer
from jaxserve.models.family import Family, Fields, GgufFormat, HfFormat
from jaxserve.models.parameters import Parameter, Place

WIDE_LAYERS = 62  # of the 27B, whose queries alone are scaled by another size than a head's


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Parameters of a Gemma: norms before and after each block, of which HF stores 1 less."""

    def norm(hf: str, gguf: str) -> Parameter:
        return declare.norm(config.hidden_size, hf, gguf, plus_one=True)

    def layer(at: Place) -> dict[str, Parameter]:
        hf, gguf = at
        return {
            "attention_norm": norm(f"{hf}input_layernorm", f"{gguf}attn_norm"),
            **declare.attention(config, at, plus_one=True),
            "post_attention_norm": norm(
                f"{hf}post_attention_layernorm", f"{gguf}post_attention_norm"
            ),
            "mlp_norm": norm(f"{hf}pre_feedforward_layernorm", f"{gguf}ffn_norm"),
            **declare.gated_mlp(config, at),
            "post_mlp_norm": norm(f"{hf}post_feedforward_layernorm", f"{gguf}post_ffw_norm"),
        }

    return declare.model_parameters(config, layer, norm("model.norm", "output_norm"))


def gemma_fields(sizes: Fields, scalar: float) -> Fields:
    """What every Gemma has; scores are divided by the root of `scalar`."""
    return {
        "embed_scale": math.sqrt(sizes["hidden_size"]),
        "attention_scale": None if scalar == sizes["head_dim"] else scalar**-0.5,
    }


def _hf(values: ConfigValues, sizes: Fields) -> Fields:
    return {
        "qk_norm": True,
        **gemma_fields(sizes, values.positive("query_pre_attn_scalar")),
        **hf_fields.rope(values, sizes, local_theta=values.positive("rope_local_base_freq")),
        **hf_fields.windows(values, sizes, values.integer("sliding_window", None)),
        "attention_soft_cap": values.positive("attn_logit_softcapping", None),
        "final_soft_cap": values.positive("final_logit_softcapping", None),
    }


def _gguf(values: ConfigValues, sizes: Fields, rope_factors: list[float] | None) -> Fields:
    # llama.cpp's rule too: GGUF has no key for it.
    is_wide = sizes["num_layers"] == WIDE_LAYERS
    scalar = sizes["hidden_size"] / sizes["num_heads"] if is_wide else sizes["head_dim"]
    pattern = values.integer("attention.sliding_window_pattern", 6)
    return {
        "qk_norm": True,
        **gemma_fields(sizes, scalar),
        **gguf_fields.rope(values, sizes, rope_factors, theta=1e6),
        "rope_theta_local": values.positive("rope.freq_base_swa", 1e4),
        **gguf_fields.windows(values, sizes, pattern),
        **gguf_fields.soft_caps(values),
        "activation": "gelu_tanh",
    }


FAMILY = Family(
    name="gemma3",
    parameters=parameters,
    layer=Layer,
    hf={
        "gemma3_text": HfFormat(
            keys=HF_COMMON.plus(
                read=(
                    "hidden_activation", "query_pre_attn_scalar", "rope_local_base_freq",
                    "sliding_window", "sliding_window_pattern", "_sliding_window_pattern",
                    "layer_types", "attn_logit_softcapping", "final_logit_softcapping",
                ),
                classes=("Gemma3ForCausalLM", "Gemma3TextModel"),
            ),
            defaults={
                "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216,
                "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
                "head_dim": 256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
                "rope_theta": 1e6, "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 256,
                "sliding_window": 4096, "sliding_window_pattern": 6, "tie_word_embeddings": True,
                "hidden_activation": "gelu_pytorch_tanh", "eos_token_id": 1, "bos_token_id": 2,
            },
            fields=_hf,
        ),
        # Text, vision and what joins them: the text part is served.
        "gemma3": HfFormat(
            keys=HF_COMMON.only("model_type", "tie_word_embeddings", "eos_token_id",
                                "bos_token_id", "text_config").plus(
                harmless=(
                    "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index",
                    "image_token_index", "boi_token_id", "eoi_token_id", "image_token_id",
                ),
                classes=("Gemma3ForConditionalGeneration", "Gemma3Model", "Gemma3ForCausalLM"),
            ),
            text_part=("text_config", "gemma3_text"),
        ),
    },
    gguf={
        "gemma3": GgufFormat(
            keys=GGUF_COMMON.plus(
                read=("rope.freq_base_swa", "attention.sliding_window_pattern"),
                harmless_prefixes=("vision.", "mm."),
            ),
            fields=_gguf,
        ),
    },
)  # fmt: skip
