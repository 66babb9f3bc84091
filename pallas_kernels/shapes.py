"""Attention shapes of real models, for tests and benchmarks."""

from typing import NamedTuple


class AttentionShape(NamedTuple):
    """One layer's attention, on one device.

    Attributes:
        model: whose it is.
        heads: query heads.
        kv_heads: KV heads.
        head_dim: size of one head.
    """

    model: str
    heads: int
    kv_heads: int
    head_dim: int


MODEL_SHAPES = (
    AttentionShape("SmolLM2-135M", 9, 3, 64),
    AttentionShape("Llama-3.1-8B", 32, 8, 128),
    AttentionShape("Gemma-3-27B", 32, 16, 128),
    AttentionShape("Gemma-3-270M", 4, 1, 256),
    AttentionShape("Qwen2.5-7B", 28, 4, 128),
)
