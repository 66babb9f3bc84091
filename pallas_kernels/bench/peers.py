"""Other projects' attention, on dense K and V of the same sizes: no pages, one length for all."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench.timing import calls_in_program, seconds_per_call
from pallas_kernels.bench.workloads import Workload
from pallas_kernels.paged_attention import Shape

CUDNN, TORCH = "jax-cudnn", "torch-sdpa"


class LeftOut(Exception):
    """A peer cannot run here; says why."""


def time_peers(workload: Workload, shape: Shape, *, repeats: int) -> dict[str, float | str]:
    """Seconds of every peer's call, or why it was left out.

    Args:
        workload: the batch.
        shape: of queries, keys and values.
        repeats: as for `seconds_per_call`.
    """
    if workload.name == "kv_write":
        return {}
    peers: dict[str, Callable[..., float]] = {CUDNN: _time_cudnn, TORCH: _time_torch}
    results: dict[str, float | str] = {}
    for name, time_peer in peers.items():
        try:
            if len(set(workload.rows)) > 1:
                raise LeftOut("it takes rows of one length, and these differ")
            results[name] = time_peer(workload, shape, repeats=repeats)
        except LeftOut as reason:
            results[name] = str(reason)
        except Exception as error:  # another project's; the rest of the run goes on
            results[name] = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
    return results


def _dims(workload: Workload, shape: Shape) -> tuple[int, int, int]:
    """Rows, query tokens of each, context of each."""
    return len(workload.rows), *workload.rows[0]


def _time_cudnn(workload: Workload, shape: Shape, *, repeats: int) -> float:
    """`jax.nn.dot_product_attention` in cuDNN: [rows, tokens, heads, head_dim]."""
    if jax.default_backend() != "gpu":
        raise LeftOut(f"cuDNN takes a GPU, and this is {jax.default_backend()}")
    rows, query, context = _dims(workload, shape)
    keys, dtype = jax.random.split(jax.random.key(2), 3), jnp.dtype(shape.dtype)
    q = jax.random.normal(keys[0], (rows, query, shape.heads, shape.head_dim), dtype)
    k, v = (
        jax.random.normal(key, (rows, context, shape.kv_heads, shape.head_dim), dtype)
        for key in keys[1:]
    )
    count = calls_in_program()

    @jax.jit
    def program(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        for _ in range(count):
            q = jax.nn.dot_product_attention(
                q, k, v, is_causal=query > 1, implementation="cudnn"
            )  # fmt: skip
        return q

    seconds = seconds_per_call(
        lambda _: program(q, k, v), None, repeats=repeats, wait=jax.block_until_ready
    )
    return seconds / count


def _time_torch(workload: Workload, shape: Shape, *, repeats: int) -> float:
    """PyTorch's `scaled_dot_product_attention`: [rows, heads, tokens, head_dim]."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        raise LeftOut("PyTorch is not installed") from None
    if not torch.cuda.is_available():
        raise LeftOut("PyTorch finds no CUDA device")
    rows, query, context = _dims(workload, shape)
    dtype = getattr(torch, jnp.dtype(shape.dtype).name)

    def draw(heads: int, tokens: int) -> Any:
        return torch.randn(rows, heads, tokens, shape.head_dim, device="cuda", dtype=dtype)

    q = draw(shape.heads, query)
    k, v = draw(shape.kv_heads, context), draw(shape.kv_heads, context)

    def advance(_: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=query > 1, enable_gqa=shape.heads != shape.kv_heads
        )

    return seconds_per_call(advance, None, repeats=repeats, wait=lambda _: torch.cuda.synchronize())
