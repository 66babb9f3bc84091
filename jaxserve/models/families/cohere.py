"""Command R and Command R7B: attention and MLP side by side after one LayerNorm."""

import dataclasses

import jax

from jaxserve.models import gguf_fields, hf_fields
from jaxserve.models import parameters as declare
from jaxserve.models.config import ModelConfig
from jaxserve.models.config_keys import GGUF_COMMON, HF_COMMON
from jaxserve.models.config_values import ConfigValues
from jaxserve.models.decoder import Layer
from jaxserve.models.family import Family, Fields, GgufFormat, HfFormat
from jaxserve.models.layers import Linear
from jaxserve.models.parameters import Parameter, Place

PATTERN = 4  # of Command R7B's layers every fourth attends fully
_GGUF_NORM = "attention.layer_norm_epsilon"


class ParallelLayer(Layer):
    """A layer whose MLP takes what attention takes, and not what comes out of it."""

    def finish(self, x: jax.Array, attended: jax.Array, linear: Linear) -> jax.Array:
        """The layer's output: both blocks on one residual."""
        expanded = self.mlp(self.norm_by("attention_norm", x), linear)
        return x + self.product(attended, "o", linear) + expanded


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Parameters of a Command R, whose rotary embeddings are interleaved."""
    size = config.hidden_size

    def layer(at: Place) -> dict[str, Parameter]:
        return {
            "attention_norm": declare.norm(size, f"{at.hf}input_layernorm", f"{at.gguf}attn_norm"),
            **declare.attention(config, at, interleaved=("hf", "gguf")),
            **declare.gated_mlp(config, at),
        }

    return declare.model_parameters(config, layer, declare.norm(size, "model.norm", "output_norm"))


def _cohere(values: ConfigValues, sizes: Fields) -> Fields:
    return {
        "layer_norm": True,
        "logit_scale": values.positive("logit_scale"),
        **hf_fields.biases(values),
        **hf_fields.rope(values, sizes),
    }


def _cohere2(values: ConfigValues, sizes: Fields) -> Fields:
    windows = hf_fields.windows(values, sizes, values.integer("sliding_window", None))
    return {**_cohere(values, sizes), **_rotating_if_sliding(windows)}


def _rotating_if_sliding(windows: Fields) -> Fields:
    sliding = windows.get("sliding_window", ())
    return {**windows, "no_rope_layers": tuple(n for n, w in enumerate(sliding) if w is None)}


def _command_r(values: ConfigValues, sizes: Fields, rope_factors: list[float] | None) -> Fields:
    return {
        "layer_norm": True,
        "logit_scale": values.number("logit_scale", 0.0, least=0) or 1.0,
        **gguf_fields.rope(values, sizes, rope_factors),
    }


def _command_r7b(values: ConfigValues, sizes: Fields, rope_factors: list[float] | None) -> Fields:
    windows = gguf_fields.windows(values, sizes, PATTERN)
    return {**_command_r(values, sizes, rope_factors), **_rotating_if_sliding(windows)}


_COHERE = HfFormat(
    keys=HF_COMMON.plus(
        read=("layer_norm_eps", "logit_scale", "attention_bias"),
        classes=("CohereForCausalLM", "CohereModel"),
    ),
    defaults={
        "vocab_size": 256000, "hidden_size": 8192, "intermediate_size": 22528,
        "num_hidden_layers": 40, "num_attention_heads": 64, "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "bos_token_id": 5, "eos_token_id": 255001,
    },
    fields=_cohere,
    norm_eps="layer_norm_eps",
)  # fmt: skip
_COMMAND_R = GgufFormat(
    keys=GGUF_COMMON.plus(read=("logit_scale", _GGUF_NORM)), fields=_command_r, norm_eps=_GGUF_NORM
)

FAMILY = Family(
    name="cohere",
    parameters=parameters,
    layer=ParallelLayer,
    hf={
        "cohere": _COHERE,
        "cohere2": dataclasses.replace(
            _COHERE,
            keys=_COHERE.keys.plus(
                read=(
                    "sliding_window", "layer_types", "sliding_window_pattern",
                    "_sliding_window_pattern",
                ),
                # What transformers' class goes by none of.
                harmless=(
                    "layer_switch", "order_of_interleaved_layers", "position_embedding_type",
                    "rotary_pct", "use_embedding_sharing", "use_gated_activation",
                    "use_parallel_block", "use_parallel_embedding",
                ),
                classes=("Cohere2ForCausalLM", "Cohere2Model"),
            ),
            defaults={
                **_COHERE.defaults, "sliding_window": 4096, "sliding_window_pattern": PATTERN,
            },
            fields=_cohere2,
        ),
    },
    gguf={
        "command-r": _COMMAND_R,
        "cohere2": dataclasses.replace(_COMMAND_R, fields=_command_r7b),
    },
)  # fmt: skip
