"""The Llama family: Llama 2 and 3, SmolLM2, Mistral, Mistral Nemo and Small."""

from collections.abc import Collection

from jaxserve.models import gguf_fields, hf_fields
from jaxserve.models import parameters as declare
from jaxserve.models.config import ModelConfig
from jaxserve.models.config_keys import GGUF_COMMON, HF_COMMON
from jaxserve.models.config_values import ConfigValues
from jaxserve.models.decoder import Layer
from jaxserve.models.family import Family, Fields, GgufFormat, HfFormat
from jaxserve.models.parameters import Format, Parameter, Place


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Parameters of a pre-norm model, of which GGUF files hold Q and K interleaved."""
    return pre_norm_parameters(config, interleaved=("gguf",))


def pre_norm_parameters(
    config: ModelConfig,
    *,
    interleaved: Collection[Format] = (),
    fused: Collection[Format] = (),
) -> dict[str, Parameter]:
    """Parameters of a model with one norm before attention and one before the MLP.

    Args:
        config: the model.
        interleaved: as of `parameters.attention`.
        fused: formats that hold Q, K and V in one tensor, and both halves of the MLP in one.
    """
    size = config.hidden_size

    def layer(at: Place) -> dict[str, Parameter]:
        return {
            "attention_norm": declare.norm(size, f"{at.hf}input_layernorm", f"{at.gguf}attn_norm"),
            **declare.attention(config, at, interleaved=interleaved, fused=fused),
            "mlp_norm": declare.norm(
                size, f"{at.hf}post_attention_layernorm", f"{at.gguf}ffn_norm"
            ),
            **declare.gated_mlp(config, at, fused=fused),
        }

    final_norm = declare.norm(size, "model.norm", "output_norm")
    return declare.model_parameters(config, layer, final_norm)


def _llama(values: ConfigValues, sizes: Fields) -> Fields:
    hf_fields.check_layer_types(values, ("full_attention",))
    return {**hf_fields.biases(values), **hf_fields.rope(values, sizes)}


def _mistral(values: ConfigValues, sizes: Fields) -> Fields:
    window = values.integer("sliding_window", None)
    return hf_fields.rope(values, sizes) | hf_fields.windows(values, sizes, window)


def gguf_decoder(values: ConfigValues, sizes: Fields, rope_factors: list[float] | None) -> Fields:
    """What GGUF tells of a decoder whose layers are all alike."""
    return {
        **gguf_fields.rope(values, sizes, rope_factors),
        **gguf_fields.windows(values, sizes),
        **gguf_fields.soft_caps(values),
    }


FAMILY = Family(
    name="llama",
    parameters=parameters,
    layer=Layer,
    hf={
        "llama": HfFormat(
            # transformers' Llama has full attention whatever these say.
            keys=HF_COMMON.plus(
                read=("layer_types", "attention_bias", "mlp_bias"),
                harmless=("sliding_window", "use_sliding_window", "max_window_layers"),
                classes=("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"),
            ),
            defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
            fields=_llama,
        ),
        "mistral": HfFormat(
            # transformers' Mistral goes by `sliding_window` alone.
            keys=HF_COMMON.plus(
                read=("sliding_window", "layer_types"),
                harmless=("use_sliding_window", "max_window_layers"),
                classes=("MistralForCausalLM", "MistralModel"),
            ),
            defaults={
                "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "sliding_window": 4096,
                "num_key_value_heads": 8,
            },
            fields=_mistral,
        ),
        # Text, vision and what joins them (Mistral Small 3.1 and later): the text part is served.
        "mistral3": HfFormat(
            keys=HF_COMMON.only("model_type", "tie_word_embeddings", "eos_token_id",
                                "bos_token_id", "text_config").plus(
                harmless=(
                    "vision_config", "image_token_index", "image_token_id",
                    "multimodal_projector_bias", "projector_hidden_act", "spatial_merge_size",
                    "vision_feature_layer",
                ),
                classes=("Mistral3ForConditionalGeneration", "Mistral3Model"),
            ),
            text_part=("text_config", "mistral"),
        ),
    },
    gguf={"llama": GgufFormat(keys=GGUF_COMMON, fields=gguf_decoder)},
)  # fmt: skip
