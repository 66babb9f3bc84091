"""Forward passes in float64 numpy, from the papers and Hugging Face's tensor names alone.

No KV cache, no batch, no jaxserve: one whole sequence at a time, one head at a time.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file


class NumpyModel:
    """A Hugging Face checkpoint directory of the Llama family, Qwen2 or Gemma 3.

    Args:
        directory: the checkpoint's.
        kv_dtype: what keys, as attention sees them, and values are rounded to; None: not at all.
    """

    def __init__(self, directory: Path, kv_dtype: Any = None) -> None:
        self.kv_dtype = np.dtype(np.float64 if kv_dtype is None else kv_dtype)
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        self.tensors = {
            name.removeprefix("model."): value.astype(np.float64)
            for name, value in load_file(directory / "model.safetensors").items()
        }
        self.is_gemma = self.config["model_type"] == "gemma3_text"

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """Logits at every position: float64 [tokens, vocab]."""
        config = self.config
        x = self.tensors["embed_tokens.weight"][token_ids]
        if self.is_gemma:
            x = x * math.sqrt(config["hidden_size"])
        for layer in range(config["num_hidden_layers"]):
            x = self._layer(x, layer)
        x = self._norm(x, "norm.weight")
        tied = config["tie_word_embeddings"]
        head = self.tensors["embed_tokens.weight" if tied else "lm_head.weight"]
        return x @ head.T

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The `count` tokens that greedy decoding adds."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    def _layer(self, x: np.ndarray, layer: int) -> np.ndarray:
        p = f"layers.{layer}."
        attended = self._attention(self._norm(x, p + "input_layernorm.weight"), layer)
        if not self.is_gemma:
            x = x + attended
            return x + self._mlp(self._norm(x, p + "post_attention_layernorm.weight"), p)
        x = x + self._norm(attended, p + "post_attention_layernorm.weight")
        expanded = self._mlp(self._norm(x, p + "pre_feedforward_layernorm.weight"), p)
        return x + self._norm(expanded, p + "post_feedforward_layernorm.weight")

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        weight = self.tensors[name] + (1 if self.is_gemma else 0)
        mean_square = (x**2).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self.config["rms_norm_eps"]) * weight

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        out = x @ self.tensors[name + ".weight"].T
        return out + self.tensors.get(name + ".bias", 0.0)

    def _mlp(self, x: np.ndarray, p: str) -> np.ndarray:
        gate, up = self._linear(x, p + "mlp.gate_proj"), self._linear(x, p + "mlp.up_proj")
        if self.is_gemma:
            gate = gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate / (1 + np.exp(-gate))
        return self._linear(gate * up, p + "mlp.down_proj")

    def _attention(self, x: np.ndarray, layer: int) -> np.ndarray:
        config, p = self.config, f"layers.{layer}.self_attn."
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        dim = config["head_dim"]
        window = None
        if (self.is_gemma and config["layer_types"][layer] == "sliding_attention") or config[
            "model_type"
        ] == "mistral":
            window = config["sliding_window"]
        scale = config.get("query_pre_attn_scalar", dim) ** -0.5
        frequencies = self._frequencies(local=self.is_gemma and window is not None)
        q, k, v = (self._linear(x, p + f"{name}_proj").reshape(len(x), -1, dim) for name in "qkv")
        if self.is_gemma:
            q, k = self._norm(q, p + "q_norm.weight"), self._norm(k, p + "k_norm.weight")
        q, k = _rotate(q, frequencies), _rotate(k, frequencies)
        k, v = (x.astype(self.kv_dtype).astype(np.float64) for x in (k, v))
        age = np.arange(len(x))[:, None] - np.arange(len(x))
        hidden = (age < 0) | (age >= (window or len(x)))
        outputs = []
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = np.where(hidden, -np.inf, q[:, head] @ k[:, kv].T * scale)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            outputs.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, kv])
        return self._linear(np.concatenate(outputs, axis=1), p + "o_proj")

    def _frequencies(self, *, local: bool) -> np.ndarray:
        config = self.config
        theta = config.get("rope_theta", 1e6)  # Gemma 3's defaults may be left out
        if local:
            theta = config.get("rope_local_base_freq", 1e4)
        dim = config["head_dim"]
        frequencies = np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])
        scaling = config.get("rope_scaling")
        if scaling is None or local:
            return frequencies
        factor = scaling["factor"]
        if scaling["rope_type"] == "linear":
            return frequencies / factor
        assert scaling["rope_type"] == "llama3"
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        # Turns that a pair makes within the context it was first trained on.
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / factor)


def _rotate(x: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Rotate pairs (i, i + dim / 2) of x [tokens, heads, dim] as complex numbers."""
    angle = np.arange(len(x))[:, None, None] * frequencies
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)
