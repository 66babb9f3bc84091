"""kv_write against a loop over tokens in numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.kv_write import kv_write, resolve_implementation
from pallas_kernels.paged_batch import PagedBatch, values_dtype
from tests.pallas_kernels.paged_case import GARBAGE

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


def test_in_place_when_donated():
    """A second write of one token must not cost the pool's size in memory or in copying."""
    pool = jnp.zeros((LAYERS, 997, 2, KV_HEADS, 16, 64), jnp.float32)
    k = jnp.ones((TOKENS, KV_HEADS, 64), jnp.float32)
    batch = make_batch([(1, 7), (5, 5)], seed=0)
    program = jax.jit(partial(kv_write, layer=1), donate_argnums=0)
    compiled = program.lower(pool, k, k, batch).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == pool.nbytes
    assert memory.temp_size_in_bytes < pool.nbytes / 100
    address = pool.unsafe_buffer_pointer()
    out = compiled(pool, k, k, batch)
    assert pool.is_deleted() and out.unsafe_buffer_pointer() == address


def test_implementation_names():
    assert resolve_implementation("auto") in ("xla", "tpu", "gpu")
    for name in ("reference", "xla", "tpu"):
        assert resolve_implementation(name) == name
    with pytest.raises(ValueError, match="no KV write 'magic'"):
        resolve_implementation("magic")
