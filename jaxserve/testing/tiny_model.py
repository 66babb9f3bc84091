"""A model small enough to build, compile and run within a second, as real files on disk."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxserve.core.errors import ConfigError
from jaxserve.models.config_hf import from_hf_config
from jaxserve.models.registry import parameters_of
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

_SHAPES: dict[str, Any] = {
    "vocab_size": 272,  # 258 of the byte tokenizer, padded as real models pad theirs
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": ByteTokenizer.BOS,
    "eos_token_id": ByteTokenizer.EOS,
}
_BELOW_ONE = ("gemma2", "gemma3")  # families whose norms are stored minus one
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "rope_theta": 10000.0},
    "mistral": {"tie_word_embeddings": False, "rope_theta": 10000.0, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True, "rope_theta": 1000000.0},
    "qwen3": {"tie_word_embeddings": False, "rope_theta": 1000000.0},
    "smollm3": {"tie_word_embeddings": True, "num_hidden_layers": 4},
    "granite": {
        "tie_word_embeddings": True, "embedding_multiplier": 3.0, "attention_multiplier": 0.25,
        "residual_multiplier": 0.7, "logits_scaling": 0.5,
    },
    "olmo2": {"tie_word_embeddings": False},
    "olmo3": {"tie_word_embeddings": False, "sliding_window": 24},
    "phi3": {"tie_word_embeddings": False, "partial_rotary_factor": 0.5},
    "glm4": {"tie_word_embeddings": False},
    "cohere": {"tie_word_embeddings": True, "layer_norm_eps": 1e-5, "logit_scale": 0.5},
    "cohere2": {"layer_norm_eps": 1e-5, "logit_scale": 0.5, "sliding_window": 24},
    "starcoder2": {"tie_word_embeddings": True},
    "gemma2": {
        "tie_word_embeddings": True, "query_pre_attn_scalar": 8, "sliding_window": 24,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "tie_word_embeddings": True,
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 8,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}  # fmt: skip


def write_tiny_checkpoint(
    directory: Path, *, family: str = "llama", seed: int = 0, **config: Any
) -> Path:
    """Write a tiny random model, as Hugging Face lays it out, with a `ByteTokenizer`.

    Everything that takes a model takes the directory: `LLM`, `jaxserve serve`, `open_checkpoint`,
    `load_tokenizer`, transformers. The weights are drawn so that logits are spread enough for
    greedy decoding not to hang on rounding.

    Args:
        directory: where to write; made if it is not there. Its name becomes the model's name.
        family: a model type of config.json, such as `llama`, `mistral`, `qwen2` or `gemma3`.
        seed: seed of the weights.
        config: other entries for config.json than the tiny ones, such as `hidden_size=48`.

    Returns:
        `directory`.

    Raises:
        ConfigError: there is no such family, or the configuration is not supported.
    """
    if family not in _FAMILIES:
        raise ConfigError(f"no tiny {family!r} model; there are: {', '.join(_FAMILIES)}")
    model_type = "gemma3_text" if family == "gemma3" else family
    data = {"model_type": model_type, **_SHAPES, **_FAMILIES[family], **config}
    shapes = {
        piece.tensor: piece.shape
        for parameter in parameters_of(from_hf_config(data)).values()
        for piece in parameter.sources["hf"]
    }
    random = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(data, indent=2) + "\n", "utf-8")
    save_file(
        {name: _draw(random, name, shape, family) for name, shape in sorted(shapes.items())},
        directory / "model.safetensors",
        metadata={"format": "pt"},  # transformers refuses a file that does not say so
    )
    ByteTokenizer().save(directory)
    return directory


def _draw(
    random: np.random.Generator, name: str, shape: tuple[int, ...], family: str
) -> np.ndarray:
    values = random.standard_normal(shape, np.float32)
    if name.endswith(".bias"):
        return 0.5 * values
    if "norm" in name:  # a factor near one
        return 0.1 * values + (0.0 if family in _BELOW_ONE else 1.0)
    if "embed" in name:  # small beside what the layers add, or a tied head repeats its input
        return 0.1 * values
    return values * shape[-1] ** -0.5  # fan-in is the last axis: sizes stay what they are
