"""Configurations as they are published load; a key that may change the mathematics is named."""

import dataclasses
import logging

import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.models.config_gguf import from_gguf
from jaxserve.models.config_hf import from_hf_config
from jaxserve.models.config_readers import from_preset

# What save_pretrained of transformers 4 writes when it writes everything.
EVERYTHING = {
    "_name_or_path": "", "add_cross_attention": False, "architectures": None,
    "bad_words_ids": None, "begin_suppress_tokens": None, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None, "decoder_start_token_id": None, "diversity_penalty": 0.0,
    "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None, "finetuning_task": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False,
    "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0,
    "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1,
    "num_beams": 1, "num_return_sequences": 1, "output_attentions": False,
    "output_hidden_states": False, "output_scores": False, "pad_token_id": None, "prefix": None,
    "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False,
    "repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False,
    "sep_token_id": None, "suppress_tokens": None, "task_specific_params": None,
    "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False,
    "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torch_dtype": "bfloat16",
    "torchscript": False, "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip
LLAMA_2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA_3 = LLAMA_2 | {
    "_name_or_path": None, "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128009, "intermediate_size": 14336,
    "max_position_embeddings": 8192, "num_key_value_heads": 8, "rope_theta": 500000.0,
    "vocab_size": 128256,
}  # fmt: skip
LLAMA_32 = LLAMA_3 | {
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_size": 2048,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "num_hidden_layers": 16, "tie_word_embeddings": True,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip
SMOLLM2 = LLAMA_3 | {
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "hidden_size": 576,
    "intermediate_size": 1536, "is_llama_config": True, "rope_interleaved": False,
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "tie_word_embeddings": True, "vocab_size": 49152, "initializer_range": 0.041666666666666664,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
}  # fmt: skip
MISTRAL_01 = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
MISTRAL_NEMO = MISTRAL_01 | {
    "attention_dropout": 0.0, "head_dim": 128, "sliding_window": None, "hidden_size": 5120,
    "num_hidden_layers": 40, "vocab_size": 131072, "rope_theta": 1000000.0,
}  # fmt: skip
QWEN_2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
    "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN_25_5 = {k: v for k, v in QWEN_2.items() if k not in ("torch_dtype", "rope_theta")} | {
    "dtype": "bfloat16", "layer_types": ["full_attention"] * 24, "rope_scaling": None,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "sliding_window": None,
}  # fmt: skip
GEMMA_270M = {
    "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2,
    "eos_token_id": 1, "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640, "initializer_range": 0.02,
    "intermediate_size": 2048, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "num_attention_heads": 4, "num_hidden_layers": 18, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0,
    "sliding_window": 512, "torch_dtype": "bfloat16", "transformers_version": "4.55.0.dev0",
    "use_bidirectional_attention": False, "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
GEMMA_1B = {k: v for k, v in GEMMA_270M.items() if k[0] != "_" and k != "layer_types"} | {
    "cache_implementation": "hybrid", "eos_token_id": [1, 106], "hidden_size": 1152,
    "intermediate_size": 6912, "num_hidden_layers": 26, "sliding_window_pattern": 6,
}  # fmt: skip
GEMMA_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
    "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
    "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model",
                      "vision_use_head": False},
}  # fmt: skip
GEMMA_12B_5 = GEMMA_4B | {
    "dtype": "bfloat16", "boi_token_id": 255999, "image_token_id": 262144,
    "text_config": EVERYTHING | GEMMA_270M | {
        "rope_parameters": {
            "full_attention": {"factor": 8.0, "rope_theta": 1000000.0, "rope_type": "linear"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    },
}  # fmt: skip
MISTRAL_SMALL = {
    "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10,
    "model_type": "mistral3", "multimodal_projector_bias": False, "projector_hidden_act": "gelu",
    "spatial_merge_size": 2, "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1024, "model_type": "pixtral"}, "vision_feature_layer": -1,
    "text_config": {
        "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
        "initializer_range": 0.02, "intermediate_size": 32768, "max_position_embeddings": 131072,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0,
        "sliding_window": None, "use_cache": True, "vocab_size": 131072,
    },
}  # fmt: skip
QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288,
    "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
GRANITE_31 = {
    "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
    "attention_multiplier": 0.0078125, "bos_token_id": 0, "embedding_multiplier": 12.0,
    "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 12800, "logits_scaling": 16.0, "max_position_embeddings": 131072,
    "mlp_bias": False, "model_type": "granite", "num_attention_heads": 32,
    "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0,
    "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 10000000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 49155,
}  # fmt: skip
PHI_3 = {
    "_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"],
    "attention_dropout": 0.0, "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config",
                 "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.2",
    "use_cache": True, "attention_bias": False, "vocab_size": 32064,
}  # fmt: skip
COMMAND_R7B = {
    "architectures": ["Cohere2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 5, "cache_implementation": "hybrid", "eos_token_id": 255001, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "layer_norm_eps": 1e-05, "layer_switch": 4, "logit_scale": 0.25,
    "max_position_embeddings": 8192, "model_type": "cohere2", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8,
    "order_of_interleaved_layers": "local_attn_first", "pad_token_id": 0,
    "position_embedding_type": "rope_gptj", "rope_scaling": None, "rope_theta": 50000,
    "rotary_pct": 1.0, "sliding_window": 4096, "sliding_window_pattern": 4,
    "torch_dtype": "bfloat16", "use_cache": True, "use_embedding_sharing": True,
    "use_gated_activation": True, "use_parallel_block": True, "use_parallel_embedding": True,
    "vocab_size": 256000,
}  # fmt: skip
PUBLISHED = {
    "mistral-small-3.1": MISTRAL_SMALL, "qwen3": QWEN_3, "granite-3.1": GRANITE_31,
    "phi-3": PHI_3, "command-r7b": COMMAND_R7B,
    "llama-2": LLAMA_2, "llama-3": LLAMA_3, "llama-3.2": LLAMA_32, "smollm2": SMOLLM2,
    "mistral-0.1": MISTRAL_01, "mistral-nemo": MISTRAL_NEMO, "qwen2": QWEN_2,
    "qwen2.5 by transformers 5": QWEN_25_5, "gemma3-270m": GEMMA_270M, "gemma3-1b": GEMMA_1B,
    "gemma3-4b": GEMMA_4B, "gemma3-12b by transformers 5": GEMMA_12B_5,
    "everything": EVERYTHING | LLAMA_2,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_load(name, caplog):
    data = PUBLISHED[name]
    config = from_hf_config(data)
    sizes = data.get("text_config", data)
    assert (config.hidden_size, config.num_layers) == (
        sizes["hidden_size"], sizes["num_hidden_layers"],
    )  # fmt: skip
    assert not caplog.records


@pytest.mark.parametrize(("data", "preset"), [(QWEN_3, "qwen3-8b"), (GRANITE_31, "granite-3.1-8b")])
def test_published_configurations_are_their_presets(data, preset):
    """But for more tokens that end an answer, which stand in generation_config.json."""
    expected = from_preset(preset)
    got = from_hf_config(data, name=preset)
    assert dataclasses.replace(got, eos_token_ids=expected.eos_token_ids) == expected


@pytest.mark.parametrize(
    ("data", "change", "message"),
    [
        (QWEN_2, {"is_causal": False}, "is_causal = False is not supported"),
        (GEMMA_270M, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        (LLAMA_3, {"rope_interleaved": True}, "rope_interleaved"),
        (LLAMA_3, {"quantization": {"bits": 4}}, "quantization"),
        (LLAMA_3, {"logits_scaling": 8.0}, "logits_scaling = 8.0"),
        (LLAMA_3, {"layer_types": ["sliding_attention"] * 32}, "layer_types other than full"),
    ],
)
def test_what_changes_the_mathematics_is_refused_whatever_is_allowed(data, change, message):
    for allowed in (False, True):
        with pytest.raises(ConfigError, match=message):
            from_hf_config({**data, **change}, allow_unknown=allowed)


@pytest.mark.parametrize(
    ("data", "change", "message"),
    [
        (LLAMA_3, {"no_rope_layers": [1, 0]}, r"no_rope_layers = \[1, 0\]"),
        (QWEN_2, {"dual_chunk_attention_config": {}, "b": 1}, "b = 1, dual_chunk_attention_config"),
        (LLAMA_3, {"architectures": ["LlamaBidirectionalModel"]}, "LlamaBidirectionalModel"),
        (QWEN_2, {"auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}}, "modeling_qwen"),
        (GEMMA_4B, {"audio_config": {"a": 1}}, "audio_config"),
        (LLAMA_3, {"rope_scaling": {"rope_type": "linear", "factor": 2, "gamma": 3}}, "gamma = 3"),
    ],
)
def test_unknown_keys_are_refused_unless_allowed(data, change, message, caplog):
    with pytest.raises(ConfigError, match=message) as refused:
        from_hf_config({**data, **change})
    assert "--allow-unknown-config" in str(refused.value)
    with caplog.at_level(logging.WARNING):
        from_hf_config({**data, **change}, allow_unknown=True)
    assert "passed over as allowed" in caplog.text


def test_what_says_nothing_is_no_unknown_key():
    says_nothing = {"novelty": None, "auto_map": {"AutoTokenizer": "a.B"}}
    from_hf_config({**LLAMA_3, **says_nothing, "layer_types": ["full_attention"] * 32})


GGUF = {
    "general.architecture": "qwen2", "general.name": "x", "general.anything": 1,
    "qwen2.block_count": 2, "qwen2.context_length": 64, "qwen2.embedding_length": 64,
    "qwen2.feed_forward_length": 96, "qwen2.attention.head_count": 4,
    "qwen2.attention.head_count_kv": 2, "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen2.rope.freq_base": 1e6, "qwen2.vocab_size": 41, "qwen2.pooling_type": 3,
    "tokenizer.ggml.eos_token_id": 2, "quantize.imatrix.file": "x",
}  # fmt: skip


def test_keys_of_gguf_metadata():
    assert from_gguf(GGUF).num_kv_heads == 2
    for allowed in (False, True):
        with pytest.raises(ConfigError, match=r"attention\.causal = False"):
            from_gguf({**GGUF, "qwen2.attention.causal": False}, allow_unknown=allowed)
    unknown = {**GGUF, "qwen2.attention.novelty": 2}
    with pytest.raises(ConfigError, match=r"attention\.novelty = 2.*--allow-unknown-config"):
        from_gguf(unknown)
    assert from_gguf(unknown, allow_unknown=True) == from_gguf(GGUF)
