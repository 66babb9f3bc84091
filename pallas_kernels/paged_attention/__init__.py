"""Ragged attention over a paged KV cache: prefill chunks and decode rows in one call."""

from typing import Literal, overload

import jax

from pallas_kernels.kv_pages import KvPool, check_scales, head_dim_of, is_joined
from pallas_kernels.paged_attention.choice import (
    Implementation,
    choose_implementation,
    kernel_module,
)
from pallas_kernels.paged_attention.tuning import Shape
from pallas_kernels.paged_batch import PagedBatch, values_dtype

__all__ = ["Implementation", "Shape", "choose_implementation", "paged_attention", "prepare"]

TAKES_JOINED = ("tpu", "xla", "reference")  # pools with K and V side by side; others read memory


def prepare(implementation: str, kv_dtype: jax.typing.DTypeLike) -> None:
    """Get ready what programs call that were compiled before and come from a file.

    Only the CPU's kernel lives outside of them; tracing `paged_attention` does this by itself.

    Args:
        implementation: one that `choose_implementation` gave.
        kv_dtype: of the pool's values.
    """
    if implementation == "cpu":
        kernel_module("cpu").prepare(kv_dtype)


@overload
def paged_attention(
    q: jax.Array,
    kv_pages: KvPool,
    batch: PagedBatch,
    *,
    layer: int | jax.Array,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    return_lse: Literal[False] = False,
    implementation: str = "auto",
) -> jax.Array: ...


@overload
def paged_attention(
    q: jax.Array,
    kv_pages: KvPool,
    batch: PagedBatch,
    *,
    layer: int | jax.Array,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    return_lse: Literal[True],
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]: ...


def paged_attention(
    q: jax.Array,
    kv_pages: KvPool,
    batch: PagedBatch,
    *,
    layer: int | jax.Array,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal, grouped-query attention of ragged queries over paged keys and values.

    Token t at absolute position p attends to positions p' <= p of its own row, and with a
    sliding window only to p' > p - sliding_window. The K and V of the step's own tokens must
    already be in their pages (`kv_write`). Query head h reads KV head h // (heads / kv_heads).
    Technique: PagedAttention (Kwon et al., SOSP 2023) with FlashAttention's online softmax.

    Args:
        q: [tokens, heads, head_dim].
        kv_pages: [layers, pages, 2, kv_heads, page_size, head_dim]; of q's dtype, or of another
            one where the implementation takes both; with scales if quantised (`KvPages`).
        batch: the ragged batch; see `PagedBatch`.
        layer: index on the pool's first axis.
        scale: what scores are multiplied by.
        sliding_window: positions a token sees, itself included; None sees all.
        soft_cap: if given, scores become soft_cap * tanh(scores / soft_cap).
        return_lse: also return the log-sum-exp, for merging partial attentions.
        implementation: "auto" picks the fastest for this machine's device
            (`choose_implementation`); a named one is used or fails.

    Returns:
        [tokens, heads, head_dim] in q's dtype, and with `return_lse` float32 [tokens, heads], the
        natural logarithm of the sum of exp(scores), scaled and capped. Rows of padding tokens
        hold no meaning.

    Raises:
        ValueError: unknown implementation, or shapes or dtypes that the one named does not take.
    """
    check_scales(kv_pages)
    if implementation == "auto":
        heads, (kv_heads, page_size) = q.shape[1], kv_pages.shape[3:5]
        kv_dtype = values_dtype(kv_pages.dtype)
        shape = Shape(heads, kv_heads, head_dim_of(kv_pages), page_size, kv_dtype, q.dtype)
        implementation = choose_implementation("auto", jax.devices()[0], shape)
    if is_joined(kv_pages) and implementation not in TAKES_JOINED:
        raise ValueError(f"attention {implementation!r} takes K and V apart, not side by side")
    return kernel_module(implementation).paged_attention(
        q,
        kv_pages,
        batch,
        layer=layer,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        return_lse=return_lse,
    )
