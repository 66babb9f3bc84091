"""StarCoder 2: LayerNorms and biases everywhere, and an MLP without a gate."""

import jax

from jaxserve.models import hf_fields
from jaxserve.models import parameters as declare
from jaxserve.models.config import ModelConfig
from jaxserve.models.config_keys import GGUF_COMMON, HF_COMMON
from jaxserve.models.config_values import ConfigValues
from jaxserve.models.decoder import Layer
from jaxserve.models.families.llama import gguf_decoder
from jaxserve.models.family import Family, Fields, GgufFormat, HfFormat
from jaxserve.models.layers import Linear, activate
from jaxserve.models.parameters import Parameter, Place

_GGUF_NORM = "attention.layer_norm_epsilon"


class PlainLayer(Layer):
    """A layer whose MLP has no gate."""

    def mlp(self, x: jax.Array, linear: Linear) -> jax.Array:
        """The MLP of x [tokens, hidden], which is normed already."""
        expanded = activate(self.product(x, "up", linear), self.config.activation)
        return self.product(expanded, "down", linear)


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Parameters of a StarCoder 2."""
    size = config.hidden_size

    def norm(name: str, hf: str, gguf: str) -> dict[str, Parameter]:
        bias = declare.bias(size, hf, gguf)
        return {name: declare.norm(size, hf, gguf), f"{name}_bias": bias}

    def layer(at: Place) -> dict[str, Parameter]:
        hf, gguf = at
        return {
            **norm("attention_norm", f"{hf}input_layernorm", f"{gguf}attn_norm"),
            **declare.attention(config, at),
            **norm("mlp_norm", f"{hf}post_attention_layernorm", f"{gguf}ffn_norm"),
            **declare.plain_mlp(config, at),
        }

    final = norm("final_norm", "model.norm", "output_norm")
    return {**declare.model_parameters(config, layer, final["final_norm"]), **final}


def _biases(has: bool) -> Fields:
    return {"layer_norm": True, "qkv_bias": has, "o_bias": has, "mlp_bias": has}


def _hf(values: ConfigValues, sizes: Fields) -> Fields:
    window = values.integer("sliding_window", None)
    return {
        **_biases(values.flag("use_bias", True)),
        **hf_fields.rope(values, sizes),
        **hf_fields.windows(values, sizes, window),
    }


def _gguf(values: ConfigValues, sizes: Fields, rope_factors: list[float] | None) -> Fields:
    fields = gguf_decoder(values, sizes, rope_factors)
    return {**_biases(True), **fields, "activation": "gelu_tanh"}


FAMILY = Family(
    name="starcoder2",
    parameters=parameters,
    layer=PlainLayer,
    hf={
        "starcoder2": HfFormat(
            keys=HF_COMMON.plus(
                read=("norm_epsilon", "use_bias", "sliding_window"),
                harmless=(
                    "embedding_dropout", "residual_dropout", "activation_function",
                    "layer_norm_epsilon", "mlp_type", "norm_type", "attention_softmax_in_fp32",
                    "scale_attention_softmax_in_fp32", "scale_attn_weights",
                ),
                classes=("Starcoder2ForCausalLM", "Starcoder2Model"),
            ),
            defaults={
                "vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288,
                "num_hidden_layers": 30, "num_attention_heads": 24, "num_key_value_heads": 2,
                "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 4096,
                "norm_epsilon": 1e-5, "tie_word_embeddings": True, "bos_token_id": 50256,
                "eos_token_id": 50256,
            },
            fields=_hf,
            norm_eps="norm_epsilon",
        ),
    },
    gguf={
        "starcoder2": GgufFormat(
            keys=GGUF_COMMON.plus(read=(_GGUF_NORM,)), fields=_gguf, norm_eps=_GGUF_NORM
        ),
    },
)  # fmt: skip
