"""Paged attention on CPUs: a custom call of XLA:CPU, compiled by Numba.

What XLA makes of paged attention gathers pages into new arrays, and multiplies those. Here every
page is read where it lies, once, by the thread that needs it. Work is split into items that all
threads share: a span of one decode row's context (flash-decoding, Dao et al., 2023, so that one
long row keeps all cores busy), or one KV head of a tile of prefill queries. Both keep
FlashAttention's running maximum and sum in float32.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cpu_calls import targets
from pallas_kernels.kv_pages import KvPool, is_quantised, scales_of, values_of
from pallas_kernels.paged_attention.tuning import Shape
from pallas_kernels.paged_batch import PagedBatch, bits_dtype, values_dtype

DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")
# By whether the pool has scales: a call's name, and the module that makes it.
_CALLS = {
    False: ("jaxserve_paged_attention", "pallas_kernels.paged_attention.cpu_call"),
    True: ("jaxserve_paged_attention_codes", "pallas_kernels.paged_attention.cpu_codes_call"),
}
NO_WINDOW = np.iinfo(np.int32).max


def refusal(shape: Shape) -> str | None:
    """Why the kernel does not take a shape, or None if it does."""
    if jnp.dtype(shape.dtype).name not in DTYPES:
        names = f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}"
        return f"it takes {names}, not {jnp.dtype(shape.dtype).name}"
    if sys.platform not in ("linux", "darwin"):
        return f"it takes Linux or macOS, and this is {sys.platform}"
    return None


def prepare(kv_dtype: jax.typing.DTypeLike) -> None:
    """Make the kernel for such KV known to XLA: before a program that has it is loaded."""
    targets.prepare(*_CALLS[is_quantised(kv_dtype)])


def paged_attention(
    q: jax.Array,
    kv_pages: KvPool,
    batch: PagedBatch,
    *,
    layer: int | jax.Array,
    scale: float,
    sliding_window: int | jax.Array | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`pallas_kernels.paged_attention.paged_attention` on a CPU; window and layer may be traced.

    Raises:
        ValueError: the pool is of a type that is none of DTYPES.
    """
    heads, (kv_heads, page_size, head_dim) = q.shape[1], kv_pages.shape[3:]
    if reason := refusal(Shape(heads, kv_heads, head_dim, page_size, values_dtype(kv_pages.dtype))):
        raise ValueError(f"attention 'cpu': {reason}")
    prepare(kv_pages.dtype)
    window = NO_WINDOW if sliding_window is None else sliding_window
    values, scales = values_of(kv_pages), scales_of(kv_pages)
    if scales is None:
        scales = jnp.zeros(1, jnp.float32)  # not looked at
    elif (held := bits_dtype(values.dtype)) != values.dtype:
        values = jax.lax.bitcast_convert_type(values, held)  # what XLA's interface has a name for
    outs = [jax.ShapeDtypeStruct(q.shape, jnp.float32)]
    if return_lse:
        outs.append(jax.ShapeDtypeStruct(q.shape[:2], jnp.float32))
    out, *lse = jax.ffi.ffi_call(_CALLS[is_quantised(kv_pages.dtype)][0], outs)(
        q.astype(jnp.float32),
        values,
        jnp.stack([jnp.asarray(layer, jnp.int32), jnp.asarray(window, jnp.int32)]),
        jnp.asarray([scale, soft_cap or 0.0], jnp.float32),
        *batch,
        scales,
    )
    out = out.astype(q.dtype)
    return (out, lse[0]) if return_lse else out
