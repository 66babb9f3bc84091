import dataclasses
import json
import math

import pytest

from jaxserve.core.errors import ConfigError, ModelNotFound
from jaxserve.models.config import RopeScaling
from jaxserve.models.config_gguf import from_gguf
from jaxserve.models.config_hf import from_hf_config
from jaxserve.models.config_readers import (
    config_from_dict,
    config_to_dict,
    from_preset,
    preset_names,
)
from jaxserve.models.registry import num_parameters

# Sizes of the published checkpoints; Gemma 3 27B's is the 27,432,406,640 of the whole model
# less its vision tower (416,866,032) and projector (6,194,304).
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "gemma3-270m": 268_098_176,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.3-70b": 70_553_706_496,
    "qwen2.5-coder-0.5b": 494_032_768,
    "qwen2.5-coder-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "mistral-7b": 7_248_023_552,
    "gemma3-27b": 27_009_346_304,
    "mistral-nemo-12b": 12_247_782_400,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "smollm3-3b": 3_075_098_624,
    "granite-3.1-8b": 8_170_848_256,
    "olmo2-7b": 7_298_617_344,
    "gemma2-2b": 2_614_341_888,
    "phi-4": 14_659_507_200,
    "glm4-9b": 9_400_279_040,
    "command-r-35b": 34_980_831_232,
    "starcoder2-3b": 3_030_371_328,
}

LLAMA_31 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
    "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
QWEN_25 = {
    "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584,
    "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
    "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "use_sliding_window": False,
    "vocab_size": 152064,
}  # fmt: skip
MISTRAL_03 = {
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "vocab_size": 32768,
}  # fmt: skip
GEMMA_27B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106],
    "model_type": "gemma3", "vision_config": {"hidden_size": 1152},
    "text_config": {
        "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504,
        "model_type": "gemma3_text", "num_attention_heads": 32, "num_hidden_layers": 62,
        "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
}  # fmt: skip


def same_but_name(a, b):
    assert dataclasses.replace(a, name="") == dataclasses.replace(b, name="")


def test_every_preset_has_its_published_size():
    assert {name: num_parameters(from_preset(name)) for name in preset_names()} == PARAMETERS


def test_unknown_preset():
    with pytest.raises(ModelNotFound, match=r"llama-3\.1-8b"):
        from_preset("llama-9")


@pytest.mark.parametrize(
    ("data", "preset", "generation"),
    [
        (LLAMA_31, "llama-3.1-8b", None),
        (QWEN_25, "qwen2.5-7b", {"eos_token_id": [151645, 151643]}),
        (MISTRAL_03, "mistral-7b", None),
        (GEMMA_27B, "gemma3-27b", {"eos_token_id": [1, 106]}),
    ],
)
def test_published_config_is_the_preset(data, preset, generation):
    same_but_name(from_hf_config(data, generation_config=generation), from_preset(preset))


def test_transformers_5_layouts():
    llama = {k: v for k, v in LLAMA_31.items() if k not in ("rope_theta", "rope_scaling")}
    llama["rope_parameters"] = {**LLAMA_31["rope_scaling"], "rope_theta": 500000.0}
    assert from_hf_config(llama) == from_hf_config(LLAMA_31)

    text = {k: v for k, v in GEMMA_27B["text_config"].items() if k != "rope_scaling"}
    text["layer_types"] = [
        "full_attention" if i % 6 == 5 else "sliding_attention" for i in range(62)
    ]
    text["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert from_hf_config({**GEMMA_27B, "text_config": text}) == from_hf_config(GEMMA_27B)


def test_gemma_layer_details():
    config = from_hf_config(GEMMA_27B)
    assert config.sliding_window[:7] == (1024,) * 5 + (None, 1024)
    assert config.embed_scale == math.sqrt(5376)
    assert config.scale == 168**-0.5
    pattern = {**GEMMA_27B["text_config"], "sliding_window_pattern": 3}
    assert from_hf_config(pattern).sliding_window[:4] == (1024, 1024, None, 1024)


def test_sliding_windows_of_the_llama_family():
    config = from_hf_config({**MISTRAL_03, "sliding_window": 4096})
    assert config.sliding_window == (4096,) * 32
    assert config.rope_theta_local is None
    config = from_hf_config({**QWEN_25, "use_sliding_window": True, "max_window_layers": 20})
    assert config.sliding_window == (None,) * 20 + (131072,) * 8


def test_head_dim_and_kv_heads_default():
    small = {k: v for k, v in LLAMA_31.items() if k != "num_key_value_heads"}
    config = from_hf_config({**small, "head_dim": None})
    assert (config.num_kv_heads, config.head_dim) == (32, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "'mixtral'"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 4.0}}, "'proportional'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0, "alpha": 2}}, "alpha"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"hidden_act": "relu"}, "'relu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"num_key_value_heads": 5}, "5 KV heads"),
    ],
)
def test_unsupported_features_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        from_hf_config({**LLAMA_31, **change})


@pytest.mark.parametrize("data", [LLAMA_31, QWEN_25, MISTRAL_03])
def test_null_kv_heads_are_as_many_as_query_heads(data):
    assert from_hf_config({**data, "num_key_value_heads": None}).group_size == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling lacks factor"),
        (
            {"rope_scaling": {k: v for k, v in LLAMA_31["rope_scaling"].items() if k[:3] != "low"}},
            "rope_scaling lacks low_freq_factor",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, not 'linear'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a number above 0"),
        ({"rope_scaling": {"type": ["linear"]}}, "type must be a string"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number from 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"hidden_size": "4096"}, "hidden_size must be a whole number"),
        ({"hidden_size": 4096.5}, "hidden_size must be a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 1024"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"rope_theta": -1}, "rope_theta must be a number above 0"),
        ({"eos_token_id": [1, "</s>"]}, "eos_token_id must be a token id"),
        ({"bos_token_id": 2.5}, "bos_token_id must be a token id"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"hidden_act": 3}, "hidden_act must be a string"),
        ({"model_type": ["llama"]}, "architecture"),
    ],
)
def test_wrong_values_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        from_hf_config({**LLAMA_31, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gemma3.attention.head_count": "32"}, "head_count must be a whole number"),
        ({"gemma3.attention.head_count": 0}, "head_count must be a whole number from 1"),
        ({"gemma3.block_count": [62, 2]}, "differs by layer"),
        ({"gemma3.block_count": [[62], [62]]}, "block_count must be a whole number"),
        ({"gemma3.rope.scaling.factor": "8"}, "factor must be a number"),
        ({"tokenizer.ggml.eos_token_id": "1"}, "eos_token_id must be a token id"),
        ({"general.architecture": ["gemma3"]}, "architecture"),
    ],
)
def test_wrong_gguf_values_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        from_gguf({**GGUF_GEMMA_27B, **change}, vocab_size=5)


@pytest.mark.parametrize("name", ["gemma3-27b", "llama-3.1-8b"])
def test_config_survives_json(name):
    config = from_preset(name)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [({"head_size": 3}, "unknown fields.*head_size"), ({"vocab_size": ...}, "missing.*vocab_size")],
)
def test_wrong_fields(change, message):
    data = {k: v for k, v in (config_to_dict(from_preset("mistral-7b")) | change).items()
            if v is not ...}  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        config_from_dict(data)


GGUF_GEMMA_27B = {
    "general.architecture": "gemma3",
    "gemma3.context_length": 131072,
    "gemma3.embedding_length": 5376,
    "gemma3.block_count": 62,
    "gemma3.feed_forward_length": 21504,
    "gemma3.attention.head_count": 32,
    "gemma3.attention.head_count_kv": 16,
    "gemma3.attention.key_length": 128,
    "gemma3.attention.value_length": 128,
    "gemma3.attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
    "gemma3.attention.sliding_window": 1024,
    "gemma3.rope.freq_base": 1000000.0,
    "gemma3.rope.scaling.type": "linear",
    "gemma3.rope.scaling.factor": 8.0,
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.eot_token_id": 106,
}


def test_gguf_metadata_is_the_preset():
    config = from_gguf(GGUF_GEMMA_27B, vocab_size=262208, tie_embeddings=True)
    assert math.isclose(config.scale, from_preset("gemma3-27b").scale)
    same_but_name(dataclasses.replace(config, attention_scale=None),
                  dataclasses.replace(from_preset("gemma3-27b"), attention_scale=None))  # fmt: skip


def test_gguf_per_layer_values():
    key = "gemma3.attention.head_count_kv"
    assert from_gguf({**GGUF_GEMMA_27B, key: [16] * 62}, vocab_size=5).num_kv_heads == 16
    with pytest.raises(ConfigError, match="differs by layer"):
        from_gguf({**GGUF_GEMMA_27B, key: [16, 8] * 31}, vocab_size=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "mamba"}, "'mamba'"),
        ({"gemma3.rope.scaling.type": "longrope"}, "'longrope'"),
        ({"gemma3.expert_count": 8}, "expert_count = 8"),
        ({"gemma3.rope.dimension_count": 64}, "64 of 128"),
        ({"gemma3.attention.value_length": 64}, "values"),
        ({"gemma3.block_count": None}, "gemma3.block_count"),
    ],
)
def test_gguf_unsupported_features_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        from_gguf({**GGUF_GEMMA_27B, **change}, vocab_size=5)


def test_gguf_without_vocabulary():
    with pytest.raises(ConfigError, match="vocabulary"):
        from_gguf(GGUF_GEMMA_27B)
    assert from_gguf({**GGUF_GEMMA_27B, "tokenizer.ggml.tokens": ["a"] * 7}).vocab_size == 7
    assert (
        RopeScaling(kind="linear", factor=8.0)
        == from_gguf(GGUF_GEMMA_27B, vocab_size=7).rope_scaling
    )


def test_longrope_goes_by_the_longest_context_that_is_served():
    scaling = {"type": "su", "long_factor": [2.0, 3.0], "short_factor": [1.0, 1.5]}
    phi = {**LLAMA_31, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "head_dim": 4,
           "rope_scaling": scaling, "original_max_position_embeddings": 4096}  # fmt: skip
    config = from_hf_config(phi)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    found = {n: config.for_context(n).rope_scaling for n in (4096, 4097)}
    assert found[4096] and found[4096].divisors == (1.0, 1.5)
    assert found[4097] and found[4097].divisors == (2.0, 3.0)
    # The same either way, as in transformers.
    assert found[4096].attention_factor == math.sqrt(1 + math.log(32) / math.log(4096))
    with pytest.raises(ConfigError, match="as many long_factor as short_factor"):
        from_hf_config({**phi, "rope_scaling": {**scaling, "long_factor": [1.0]}})


def test_sizes_of_embeddings_that_a_model_was_trained_for():
    for keys, sizes in [
        ({}, None), ({"is_matryoshka": False}, None), ({"is_matryoshka": True}, ()),
        ({"matryoshka_dimensions": [64, 128]}, (64, 128)),
    ]:  # fmt: skip
        config = from_hf_config({**LLAMA_31, **keys})
        assert config.matryoshka_dimensions == sizes
        assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    with pytest.raises(ConfigError, match="matryoshka_dimensions must be positive"):
        from_hf_config({**LLAMA_31, "matryoshka_dimensions": [0]})
