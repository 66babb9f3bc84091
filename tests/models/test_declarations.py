"""What families declare of GGUF files, against llama.cpp's own table of tensors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
import pytest

from jaxserve.models.config import ModelConfig
from jaxserve.models.config_gguf import from_gguf
from jaxserve.models.config_readers import from_preset, preset_names
from jaxserve.models.parameters import interleaved_to_halves
from jaxserve.models.registry import FAMILIES, family_of

ARCHITECTURES = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}


def test_every_family_has_a_preset():
    assert {family_of(from_preset(name)).name for name in preset_names()} == {*FAMILIES}


@pytest.mark.parametrize("preset", ["mistral-nemo-12b", *(
    "qwen2.5-7b", "qwen3-8b", "smollm3-3b", "granite-3.1-8b", "olmo2-7b", "gemma2-2b",
    "gemma3-270m", "phi-4", "glm4-9b", "command-r-35b", "starcoder2-3b",
)])  # fmt: skip
def test_tensors_of_both_formats_are_each_others(preset: str):
    """Piece by piece: the tensor of one format is called what llama.cpp calls that of the other."""
    config = from_preset(preset)
    family = family_of(config)
    for architecture in family.gguf:
        names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_layers)
        for parameter in family.parameters(config).values():
            for hf, other in zip(parameter.sources["hf"], parameter.sources["gguf"], strict=True):
                assert names.get_name(hf.tensor, (".weight", ".bias")) == other.tensor
                assert hf.shape == other.shape


_SWA = "attention.sliding_window"
_LAYER_NORM = "attention.layer_norm_epsilon"
# Keys that llama.cpp's converter writes for one architecture and not for all.
METADATA: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-nemo-12b": ("llama", {}),
    "qwen2.5-7b": ("qwen2", {}),
    "qwen3-8b": ("qwen3", {}),
    "smollm3-3b": ("smollm3", {}),
    "granite-3.1-8b": (
        "granite",
        {"attention.scale": 0.0078125, "embedding_scale": 12.0, "residual_scale": 0.22,
         "logit_scale": 16.0},
    ),
    "olmo2-7b": ("olmo2", {}),
    "gemma2-2b": (
        "gemma2", {_SWA: 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    ),
    "phi-4": ("phi3", {}),
    "glm4-9b": ("glm4", {"rope.dimension_count": 64}),
    "command-r-35b": ("command-r", {_LAYER_NORM: 1e-5, "logit_scale": 0.0625}),
    "starcoder2-3b": ("starcoder2", {_LAYER_NORM: 1e-5, _SWA: 4096}),
}  # fmt: skip


def metadata(architecture: str, config: ModelConfig, more: Mapping[str, Any]) -> dict[str, Any]:
    """What a GGUF file tells of a model."""
    keys = {
        "context_length": config.max_model_len, "embedding_length": config.hidden_size,
        "block_count": config.num_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads, "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "rope.freq_base": config.rope_theta, "rope.dimension_count": config.head_dim,
        **({} if config.layer_norm else {"attention.layer_norm_rms_epsilon": config.norm_eps}),
    }  # fmt: skip
    own = {f"{architecture}.{key}": value for key, value in {**keys, **more}.items()}
    return {"general.architecture": architecture, **own}


@pytest.mark.parametrize("preset", METADATA)
def test_metadata_of_a_gguf_file_is_the_preset(preset: str):
    expected = from_preset(preset)
    data = metadata(METADATA[preset][0], expected, METADATA[preset][1])
    got = from_gguf(
        data, name=preset, vocab_size=expected.vocab_size, tie_embeddings=expected.tie_embeddings
    )
    named = {"eos_token_ids": expected.eos_token_ids, "bos_token_id": expected.bos_token_id}
    assert dataclasses.replace(got, **named) == expected


def test_windows_scaling_and_factors_in_gguf_files():
    """OLMo 3, Command R7B, and a Phi with LongRoPE: what their presets' siblings do not have."""
    olmo, phi = from_preset("olmo2-7b"), from_preset("phi-4")
    yarn = {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0,
        "rope.scaling.original_context_length": 8192,
    }  # fmt: skip
    window = {_SWA: 4096, f"{_SWA}_pattern": [True, True, True, False] * 8}
    got = from_gguf(metadata("olmo2", olmo, {**window, **yarn}), vocab_size=9)
    assert got.sliding_window == (4096, 4096, 4096, None) * 8
    assert got.rope_kinds == ("local", "local", "local", "full") * 8
    assert got.rope_scaling is not None and got.rope_theta_local == got.rope_theta
    assert got.rope_scaling.attention_factor == pytest.approx(1.2079441541679836)

    command = from_preset("command-r-35b")
    small = {_SWA: 4096, _LAYER_NORM: 1e-5, "logit_scale": 0.25}
    got = from_gguf(metadata("cohere2", command, small), vocab_size=9)
    assert got.rope_kinds == ("full", "full", "full", "none") * 10

    factors = [1.0 + n / 48 for n in range(48)]
    part = {"rope.dimension_count": 96, "rope.scaling.attn_factor": 1.19}
    got = from_gguf(metadata("phi3", phi, part), vocab_size=9, rope_factors=factors)
    assert got.rotary_dim == 96 and got.rope_scaling is not None
    assert got.rope_scaling.divisors == tuple(factors)
    assert got.rope_scaling.attention_factor == 1.19


def test_part_of_each_head_is_taken_apart():
    """Rows 2i and 2i + 1 of the first six of ten come to lie three apart, the rest stays."""
    rows = np.arange(20)
    halves = interleaved_to_halves(rows, 10, 6)
    assert halves.tolist() == [0, 2, 4, 1, 3, 5, 6, 7, 8, 9, 10, 12, 14, 11, 13, 15, 16, 17, 18, 19]
