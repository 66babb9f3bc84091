"""The TPU kernel of kv_write in the interpreter, against a loop over tokens in numpy."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv_pages import KvPages
from pallas_kernels.kv_write import tpu, xla
from pallas_kernels.paged_batch import PagedBatch
from tests.pallas_kernels.paged_case import GARBAGE, side_by_side
from tests.pallas_kernels.tpu_interpreter import assert_no_race, strict

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiles")]

LAYERS, PAGES, ROWS, PAGES_PER_ROW = 3, 43, 17, 7


@pytest.fixture(autouse=True)
def fresh_interpreter() -> Iterator[None]:
    """A kernel that raised leaves the interpreter's state behind, which fails the next one."""
    yield
    pltpu.reset_tpu_interpret_mode_state()


write = jax.jit(partial(tpu.kv_write, interpret=strict()))


def check(
    rows: list[tuple[int, int]],
    *,
    num_tokens: int = 83,
    kv_heads: int = 2,
    page_size: int = 16,
    head_dim: int = 32,
    layer: int = 1,
    dtype: str = "float32",
    is_joined: bool = False,
    seed: int = 0,
) -> None:
    """Write rows of (query_len, context_len) and compare the whole pool, bit by bit."""
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return np.array(jnp.asarray(random.standard_normal(shape), dtype))

    pool = draw(LAYERS, PAGES, 2, kv_heads, page_size, head_dim)
    new = draw(2, num_tokens, kv_heads, head_dim)
    starts, lens, ends = (np.zeros(ROWS, np.int32) for _ in range(3))
    table = random.choice(np.array(GARBAGE), (ROWS, PAGES_PER_ROW)).astype(np.int32)
    free = list(random.permutation(PAGES))
    expected, token = pool.copy(), 0
    for i, (query_len, context_len) in enumerate(rows):
        starts[i], lens[i], ends[i] = token, query_len, context_len
        for page in range(-(-context_len // page_size)):
            table[i, page] = free.pop()
        for position in range(context_len - query_len, context_len):
            page, slot = table[i, position // page_size], position % page_size
            expected[layer, page, :, :, slot] = new[:, token]
            token += 1
    new[:, token:] = np.nan
    batch = PagedBatch(*map(jnp.asarray, (starts, lens, ends, table)))
    if is_joined:
        pool, expected = side_by_side(pool), side_by_side(expected)
    got = write(jnp.asarray(pool), *map(jnp.asarray, new), batch, layer=jnp.int32(layer))
    assert_no_race(got)
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_mixed_rows(layer: int, dtype: str):
    # A decode, a chunk over three pages from mid-page, a fresh page, whole prompts, a border.
    check([(1, 7), (39, 41), (1, 17), (33, 33), (1, 1), (2, 33)], layer=layer, dtype=dtype)


@pytest.mark.parametrize(
    ("kv_heads", "page_size", "head_dim"), [(1, 64, 256), (3, 32, 64), (16, 16, 128)]
)
def test_shapes(kv_heads: int, page_size: int, head_dim: int):
    check(
        [(1, 9), (41, 79), (1, 65)], kv_heads=kv_heads, page_size=page_size, head_dim=head_dim,
        dtype="bfloat16",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_and_values_side_by_side(dtype: str):
    check([(1, 9), (41, 79), (1, 65)], kv_heads=3, head_dim=64, dtype=dtype, is_joined=True)


def test_more_items_than_are_in_flight():
    check([(1, 5 + i) for i in range(17)], dtype="bfloat16")


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_fewer_tokens_than_slots(num_tokens: int):
    check([(1, 20)], num_tokens=num_tokens, dtype="bfloat16")
    if num_tokens > 1:
        check([(2, 17), (1, 32)], num_tokens=num_tokens, dtype="bfloat16")


def test_padding_writes_nothing():
    check([])


@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 2**16), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_random_rows(data: st.DataObject, seed: int, dtype: str):
    budget, pages, rows = 83, PAGES, []
    for _ in range(data.draw(st.integers(0, ROWS))):
        query_len = data.draw(st.one_of(st.just(1), st.integers(1, PAGES_PER_ROW * 16)))
        context_len = data.draw(st.integers(query_len, PAGES_PER_ROW * 16))
        if query_len > budget or -(-context_len // 16) > pages:
            break
        rows.append((query_len, context_len))
        budget, pages = budget - query_len, pages - -(-context_len // 16)
    check(rows, layer=2, seed=seed, dtype=dtype)


@pytest.mark.parametrize(("dtype", "kv_heads", "page_size"), [("int8", 3, 64), ("fp8", 1, 32)])
def test_quantised_rows_as_xla_writes_them(dtype: str, kv_heads: int, page_size: int):
    """Codes and scales, bit by bit; pages and tiles filled from their middle on, and wholly."""
    random = np.random.default_rng(7)
    kind = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}[dtype]
    shape = (2, 17, 2, kv_heads, page_size, 32)
    codes = jnp.asarray(random.integers(-9, 9, shape), kind)
    pool = KvPages(codes, jnp.asarray(random.random(shape[:-1], np.float32)))
    k, v = (jnp.asarray(random.standard_normal((83, kv_heads, 32)), jnp.float32) for _ in "kv")
    lens = np.array([1, 39, 1, 33, 2, 0], np.int32)
    ends = np.array([page_size, page_size + 11, 1, 33, 2 * page_size + 1, 0], np.int32)
    starts = (np.cumsum(lens) - lens).astype(np.int32)
    table = random.permutation(17)[: 6 * 3 - 2].astype(np.int32)
    table = np.concatenate([table, [-7, 10**6]]).astype(np.int32).reshape(6, 3)
    batch = PagedBatch(*map(jnp.asarray, (starts, lens, ends, table)))
    got = write(pool, k, v, batch, layer=jnp.int32(1))
    assert_no_race(got.values)
    for mine, expected in zip(got, xla.kv_write(pool, k, v, batch, layer=1), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(expected))


def test_new_rows_are_cast_to_the_pool_s_dtype():
    pool = jnp.zeros((1, 3, 2, 1, 16, 32), jnp.bfloat16)
    k = jnp.full((1, 1, 32), 1.001, jnp.float32)
    one = jnp.ones(1, jnp.int32)
    batch = PagedBatch(one * 0, one, one * 4, one[None] * 2)
    got = write(pool, k, -k, batch, layer=0)
    assert got.dtype == jnp.bfloat16
    assert (got[0, 2, 0, 0, 3] == 1).all() and (got[0, 2, 1, 0, 3] == -1).all()


def test_refuses_pages_that_are_no_whole_tiles():
    pool = jnp.zeros((1, 3, 2, 1, 8, 32), jnp.bfloat16)
    k = jnp.zeros((1, 1, 32))
    zero = jnp.zeros(1, jnp.int32)
    batch = PagedBatch(zero, zero, zero, zero[None])
    with pytest.raises(ValueError, match="tiles of 16 slots of bfloat16; a page of 8 slots"):
        tpu.kv_write(pool, k, k, batch, layer=0)
