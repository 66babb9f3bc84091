"""Attention shapes of real models, for tests and benchmarks."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.paged_attention import Shape


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

MODELS = {shape.model: shape for shape in MODEL_SHAPES}


def model_shape(model: str, page_size: int, dtype: Any, query_dtype: Any = None) -> Shape:
    """What the kernels are told of a model's attention.

    Args:
        model: one of MODELS.
        page_size: tokens per page.
        dtype: of the pool's values.
        query_dtype: of the queries; None: as the pool's.
    """
    query_dtype = None if query_dtype is None else jnp.dtype(query_dtype)
    _, heads, kv_heads, head_dim = MODELS[model]
    return Shape(heads, kv_heads, head_dim, page_size, jnp.dtype(dtype), query_dtype)
