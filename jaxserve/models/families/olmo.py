"""OLMo 2 and 3: norms after each block, and of queries and keys over all heads together."""

import dataclasses

import jax

from jaxserve.models import hf_fields
from jaxserve.models import parameters as declare
from jaxserve.models.config import ModelConfig
from jaxserve.models.config_keys import GGUF_COMMON, HF_COMMON
from jaxserve.models.config_values import ConfigValues, expand_window
from jaxserve.models.decoder import Layer
from jaxserve.models.families.llama import gguf_decoder
from jaxserve.models.family import Family, Fields, GgufFormat, HfFormat
from jaxserve.models.layers import rms_norm
from jaxserve.models.parameters import Parameter, Place

PATTERN = 4  # of OLMo 3's layers every fourth attends fully


class OlmoLayer(Layer):
    """A layer whose queries are normed as one vector, and so are its keys."""

    def norm_heads(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries and keys as `project` returns them, each token's normed over all heads."""
        eps = self.config.norm_eps
        q = rms_norm(q, self.q_norm[...], eps, axes=(-3, -2, -1))
        return q, rms_norm(k, self.k_norm[...][:, 0], eps, axes=(-2, -1))


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Parameters of an OLMo 2 or 3."""
    size = config.hidden_size

    def layer(at: Place) -> dict[str, Parameter]:
        hf, gguf = at
        return {
            **declare.attention(config, at),
            **declare.norms_of_all_heads(config, at),
            "post_attention_norm": declare.norm(
                size, f"{hf}post_attention_layernorm", f"{gguf}post_attention_norm"
            ),
            **declare.gated_mlp(config, at),
            "post_mlp_norm": declare.norm(
                size, f"{hf}post_feedforward_layernorm", f"{gguf}post_ffw_norm"
            ),
        }

    return declare.model_parameters(config, layer, declare.norm(size, "model.norm", "output_norm"))


def _olmo2(values: ConfigValues, sizes: Fields) -> Fields:
    return {**hf_fields.biases(values), **hf_fields.rope(values, sizes)}


def _olmo3(values: ConfigValues, sizes: Fields) -> Fields:
    # Sliding layers rotate by a base that may be the same, but are never scaled.
    rope = hf_fields.rope(values, sizes, local_theta=values.positive("rope_theta"))
    windows = hf_fields.windows(values, sizes, values.integer("sliding_window", None))
    return {**_olmo2(values, sizes), **rope, **windows}


def _gguf(values: ConfigValues, sizes: Fields, rope_factors: list[float] | None) -> Fields:
    fields = gguf_decoder(values, sizes, rope_factors)
    window = values.integer("attention.sliding_window", 0, least=0)
    if not window:
        return fields
    sliding = expand_window(window, sizes["num_layers"], PATTERN)
    return {**fields, "sliding_window": sliding, "rope_theta_local": fields["rope_theta"]}


_OLMO2 = HfFormat(
    keys=HF_COMMON.plus(
        read=("attention_bias",), classes=("Olmo2ForCausalLM", "Olmo2Model"),
    ),
    defaults={
        "vocab_size": 50304, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "eos_token_id": 50279,
    },
    fields=_olmo2,
)  # fmt: skip

FAMILY = Family(
    name="olmo",
    parameters=parameters,
    layer=OlmoLayer,
    hf={
        "olmo2": _OLMO2,
        "olmo3": dataclasses.replace(
            _OLMO2,
            keys=HF_COMMON.plus(
                read=("attention_bias", "sliding_window", "layer_types"),
                classes=("Olmo3ForCausalLM", "Olmo3Model"),
            ),
            defaults={
                **_OLMO2.defaults,
                "sliding_window": 4096,
                "sliding_window_pattern": PATTERN,
                "rope_theta": 500000.0,
            },
            fields=_olmo3,
        ),
    },
    gguf={
        # llama.cpp's one architecture for both; its pattern is the one above, whatever is written.
        "olmo2": GgufFormat(
            keys=GGUF_COMMON.plus(by_layer=("attention.sliding_window_pattern",)), fields=_gguf
        ),
    },
)
