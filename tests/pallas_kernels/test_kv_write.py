"""kv_write against a loop over tokens in numpy."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.kv_pages import KvPages, quantise
from pallas_kernels.kv_write import kv_write, resolve_implementation
from pallas_kernels.paged_batch import PagedBatch, values_dtype
from tests.pallas_kernels.paged_case import GARBAGE, quantised_rows

BOTH = pytest.mark.parametrize("implementation", ["xla", "reference"])
LAYERS, KV_HEADS, PAGES, PAGE_SIZE, HEAD_DIM = 3, 2, 23, 4, 6
TOKENS, ROWS, PAGES_PER_ROW = 19, 5, 4

write = jax.jit(kv_write, static_argnames=("layer", "implementation"), donate_argnums=0)


def make_batch(rows: list[tuple[int, int]], seed: int) -> PagedBatch:
    """Rows of (query_len, context_len) on shuffled pages; garbage in what is unused."""
    random = np.random.default_rng(seed)
    free = list(random.permutation(PAGES))
    starts, lens, ends = (np.zeros(ROWS, np.int32) for _ in range(3))
    table = random.choice(np.array(GARBAGE), (ROWS, PAGES_PER_ROW)).astype(np.int32)
    token = 0
    for i, (query_len, context_len) in enumerate(rows):
        starts[i], lens[i], ends[i] = token, query_len, context_len
        token += query_len
        for page in range(-(-context_len // PAGE_SIZE)):
            table[i, page] = free.pop()
    return PagedBatch(*map(jnp.asarray, (starts, lens, ends, table)))


def check(
    rows: list[tuple[int, int]],
    *,
    layer: int,
    dtype: str = "float32",
    seed: int = 0,
    implementation: str = "xla",
):
    random = np.random.default_rng(seed + 1)
    shape = (LAYERS, PAGES, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM)
    expected = random.standard_normal(shape).astype(values_dtype(dtype))
    pool = jnp.asarray(expected.view(dtype))
    k, v = (random.standard_normal((TOKENS, KV_HEADS, HEAD_DIM)).astype(np.float32) for _ in "kv")
    batch = make_batch(rows, seed)
    token = 0
    for i, (query_len, context_len) in enumerate(rows):
        for position in range(context_len - query_len, context_len):
            page = int(batch.page_table[i, position // PAGE_SIZE])
            for kind, new in enumerate((k, v)):
                expected[layer, page, kind, :, position % PAGE_SIZE] = new[token]
            token += 1
    got = write(
        pool, jnp.asarray(k), jnp.asarray(v), batch, layer=layer, implementation=implementation
    )
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got).view(expected.dtype), expected)


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint16"])  # the last: bfloat16's bits
@pytest.mark.parametrize("layer", range(LAYERS))
def test_mixed_rows(implementation: str, layer: int, dtype: str):
    # A decode, a chunk over three pages from mid-page, a decode on a fresh page, a whole prompt.
    rows = [(1, 7), (9, 11), (1, 5), (3, 3)]
    check(rows, layer=layer, dtype=dtype, implementation=implementation)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_rows_are_quantised_by_token_and_head(dtype: str):
    """Alike in both implementations, in any batch, and as the specification says in NumPy."""
    random = np.random.default_rng(3)
    rows = [(1, 7), (9, 11), (1, 5), (3, 3)]
    k, v = (random.standard_normal((TOKENS, KV_HEADS, HEAD_DIM)).astype(np.float32) for _ in "kv")
    k[2] = 0  # has no largest number
    kind = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}[dtype]
    held = jnp.int8 if dtype == "int8" else jnp.uint8  # as a CPU has it
    shape = (LAYERS, PAGES, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM)
    codes, scales = np.full(shape, 99, held), np.full(shape[:-1], np.nan, np.float32)
    new_codes, new_scales = map(np.asarray, quantise(jnp.stack([k, v]), kind))
    batch = make_batch(rows, seed=3)
    pools = [
        write(KvPages(jnp.asarray(codes), jnp.asarray(scales)), k, v, batch, layer=1,
              implementation=name)
        for name in ("xla", "reference")
    ]  # fmt: skip
    token = 0
    for i, (query_len, context_len) in enumerate(rows):
        for position in range(context_len - query_len, context_len):
            page = int(batch.page_table[i, position // PAGE_SIZE])
            at = (1, page, slice(None), slice(None), position % PAGE_SIZE)
            codes[at], scales[at] = new_codes.view(held)[:, token], new_scales[:, token]
            token += 1
    for pool in pools:
        np.testing.assert_array_equal(np.asarray(pool.values), codes)
        np.testing.assert_array_equal(np.asarray(pool.scales), scales)
    expected, its_scales = quantised_rows(np.stack([k, v]), dtype)
    np.testing.assert_allclose(new_scales, its_scales, rtol=1e-6)
    near = np.abs(new_codes.astype(np.float32) - expected.astype(np.float32))
    assert (near <= (1 if dtype == "int8" else np.abs(expected.astype(np.float32)) / 8)).all()
    assert (near == 0).mean() > 0.99, "but for ties"


@BOTH
def test_padding_writes_nothing(implementation: str):
    check([], layer=1, implementation=implementation)


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_random_rows(data: st.DataObject, seed: int):
    budget, rows = TOKENS, []
    for _ in range(data.draw(st.integers(0, ROWS))):
        query_len = data.draw(st.integers(1, max(1, min(budget, PAGES_PER_ROW * PAGE_SIZE))))
        if query_len > budget:
            break
        rows.append((query_len, data.draw(st.integers(query_len, PAGES_PER_ROW * PAGE_SIZE))))
        budget -= query_len
    check(rows, layer=2, seed=seed)


@pytest.mark.parametrize("quantised", [False, True])
def test_in_place_when_donated(quantised: bool):
    """A second write of one token must not cost the pool's size in memory or in copying."""
    shape = (LAYERS, 997, 2, KV_HEADS, 16, 64)
    pool: Any = jnp.zeros(shape, jnp.int8 if quantised else jnp.float32)
    if quantised:
        pool = KvPages(pool, jnp.zeros(shape[:-1], jnp.float32))
    k = jnp.ones((TOKENS, KV_HEADS, 64), jnp.float32)
    batch = make_batch([(1, 7), (5, 5)], seed=0)
    program = jax.jit(partial(kv_write, layer=1), donate_argnums=0)
    compiled = program.lower(pool, k, k, batch).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == pool.nbytes
    assert memory.temp_size_in_bytes < pool.nbytes / 100
    arrays = jax.tree.leaves(pool)
    addresses = [array.unsafe_buffer_pointer() for array in arrays]
    out = compiled(pool, k, k, batch)
    assert all(array.is_deleted() for array in arrays)
    assert [array.unsafe_buffer_pointer() for array in jax.tree.leaves(out)] == addresses


def test_implementation_names():
    assert resolve_implementation("auto") in ("xla", "tpu", "gpu")
    for name in ("reference", "xla", "tpu"):
        assert resolve_implementation(name) == name
    with pytest.raises(ValueError, match="no KV write 'magic'"):
        resolve_implementation("magic")
