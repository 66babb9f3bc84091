"""SmolLM 3: Llama, some of whose layers do not rotate queries and keys."""

from jaxserve.core.errors import ConfigError
from jaxserve.models import hf_fields
from jaxserve.models.config_keys import GGUF_COMMON, HF_COMMON
from jaxserve.models.config_values import ConfigValues
from jaxserve.models.decoder import Layer
from jaxserve.models.families.llama import gguf_decoder, parameters
from jaxserve.models.family import Family, Fields, GgufFormat, HfFormat

INTERVAL = 4  # one layer in so many is not rotated; GGUF has no key for it


def _every(interval: int, layers: int) -> tuple[int, ...]:
    return tuple(n for n in range(layers) if (n + 1) % interval == 0)


def _hf(values: ConfigValues, sizes: Fields) -> Fields:
    layers = sizes["num_layers"]
    unrotated = _every(values.integer("no_rope_layer_interval", INTERVAL), layers)
    if given := values.sequence("no_rope_layers"):  # despite its name, 1 where a layer rotates
        if len(given) != layers or not all(one in (0, 1) for one in given):
            raise ConfigError(f"{values.where}: no_rope_layers must be {layers} zeros and ones")
        unrotated = tuple(n for n, rotates in enumerate(given) if not rotates)
    window = None
    if values.flag("use_sliding_window", False):
        window = values.integer("sliding_window", None)
    windows = hf_fields.windows(values, sizes, window)
    if window and not values.sequence("layer_types"):
        sliding = (window if n in unrotated else None for n in range(layers))
        windows = {"sliding_window": tuple(sliding)}
    return {
        "no_rope_layers": unrotated,
        **hf_fields.biases(values),
        **hf_fields.rope(values, sizes),
        **windows,
    }


def _gguf(values: ConfigValues, sizes: Fields, rope_factors: list[float] | None) -> Fields:
    unrotated = _every(INTERVAL, sizes["num_layers"])
    return {"no_rope_layers": unrotated, **gguf_decoder(values, sizes, rope_factors)}


FAMILY = Family(
    name="smollm3",
    parameters=parameters,
    layer=Layer,
    hf={
        "smollm3": HfFormat(
            keys=HF_COMMON.plus(
                read=(
                    "no_rope_layers", "no_rope_layer_interval", "attention_bias", "mlp_bias",
                    "sliding_window", "use_sliding_window", "layer_types",
                ),
                harmless=("max_window_layers",),
                classes=("SmolLM3ForCausalLM", "SmolLM3Model"),
            ),
            defaults={
                "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
                "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
                "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 2e6,
                "tie_word_embeddings": True, "bos_token_id": 128000, "eos_token_id": 128001,
            },
            fields=_hf,
        ),
    },
    gguf={"smollm3": GgufFormat(keys=GGUF_COMMON, fields=_gguf)},
)  # fmt: skip
