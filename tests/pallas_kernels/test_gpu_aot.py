"""The Hopper kernels through NVIDIA's compiler, at the shapes of real models, without a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention.gpu import paged_attention
from pallas_kernels.paged_batch import PagedBatch
from tests.aot.gpu import h100_compile, needs_cuda_compiler

pytestmark = needs_cuda_compiler

# model: query heads, KV heads, head_dim, sliding window, soft cap
MODELS = {
    "smollm2-135m": (9, 3, 64, None, None),
    "llama-3.1-8b": (32, 8, 128, None, None),
    "gemma-3-27b": (32, 16, 128, 1024, None),
    "gemma-3-270m": (4, 1, 256, 512, 50.0),
    "qwen2.5-7b": (28, 4, 128, None, None),
}
LAYERS = 3


def compile_step(model: str, *, tokens: int, rows: int, page_size: int, pages: int):
    """The temporary bytes of one attention, and the pool's."""
    heads, kv_heads, head_dim, window, soft_cap = MODELS[model]
    of = jax.ShapeDtypeStruct
    pool = of((LAYERS, pages, 2, kv_heads, page_size, head_dim), jnp.bfloat16)
    vector, i32 = of((rows,), jnp.int32), jnp.int32
    table = of((rows, 4096 // page_size), i32)
    batch = PagedBatch(vector, vector, vector, table)  # type: ignore[arg-type]
    attend = partial(
        paged_attention, layer=1, scale=head_dim**-0.5, sliding_window=window, soft_cap=soft_cap
    )
    q = of((tokens, heads, head_dim), jnp.bfloat16)
    memory = h100_compile(attend, q, pool, batch).memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes, pool.size * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "tokens", "rows", "page_size"),
    [
        ("smollm2-135m", 256, 256, 16), ("smollm2-135m", 512, 16, 64),
        ("llama-3.1-8b", 64, 64, 64), ("llama-3.1-8b", 2048, 64, 128),
        ("gemma-3-27b", 32, 32, 128), ("gemma-3-27b", 1024, 8, 16),
        ("gemma-3-270m", 1, 1, 16), ("gemma-3-270m", 256, 4, 128),
        ("qwen2.5-7b", 128, 128, 16), ("qwen2.5-7b", 512, 64, 64),
    ],
)  # fmt: skip
def test_real_models_compile_and_copy_no_pool(model: str, tokens: int, rows: int, page_size: int):
    temporary, pool = compile_step(
        model, tokens=tokens, rows=rows, page_size=page_size, pages=65536 // page_size
    )
    heads, _, head_dim, *_ = MODELS[model]
    q = tokens * heads * head_dim * 2
    assert temporary < pool / 20 and temporary < 4 * q + 8 * 2**20, (temporary, pool)


@pytest.mark.slow
def test_a_larger_pool_needs_no_larger_temporaries():
    small, large = (
        compile_step("llama-3.1-8b", tokens=64, rows=16, page_size=64, pages=pages)[0]
        for pages in (1000, 10000)
    )
    assert small == large
