"""Ragged attention over a paged KV cache: prefill chunks and decode rows in one call."""

from typing import Literal, overload

import jax

from pallas_kernels.paged_attention import reference, tpu, xla
from pallas_kernels.paged_batch import PagedBatch

Implementation = Literal["auto", "tpu", "xla", "reference"]


def resolve_implementation(implementation: str) -> str:
    """The implementation that a name stands for on this machine.

    Raises:
        ValueError: there is no implementation of that name.
    """
    names = {"auto": "xla", "tpu": "tpu", "xla": "xla", "reference": "reference"}
    if implementation not in names:
        raise ValueError(f"no paged attention {implementation!r}; there are {', '.join(names)}")
    return names[implementation]


@overload
def paged_attention(
    q: jax.Array,
    kv_pages: jax.Array,
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
    kv_pages: jax.Array,
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
    kv_pages: jax.Array,
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
        kv_pages: [layers, pages, 2, kv_heads, page_size, head_dim].
        batch: the ragged batch; see `PagedBatch`.
        layer: index on the pool's first axis.
        scale: what scores are multiplied by.
        sliding_window: positions a token sees, itself included; None sees all.
        soft_cap: if given, scores become soft_cap * tanh(scores / soft_cap).
        return_lse: also return the log-sum-exp, for merging partial attentions.
        implementation: "auto" picks the fastest for the platform; a named one is used or fails.

    Returns:
        [tokens, heads, head_dim] in q's dtype, and with `return_lse` float32 [tokens, heads], the
        natural logarithm of the sum of exp(scores), scaled and capped. Rows of padding tokens
        hold no meaning.

    Raises:
        ValueError: unknown implementation.
    """
    implementations = {
        "tpu": tpu.paged_attention,
        "xla": xla.paged_attention,
        "reference": reference.paged_attention,
    }
    return implementations[resolve_implementation(implementation)](
        q,
        kv_pages,
        batch,
        layer=layer,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        return_lse=return_lse,
    )
