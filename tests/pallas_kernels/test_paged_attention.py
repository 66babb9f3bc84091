"""Paged attention, fast and reference, against dense float64 attention of every row by itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.kv_pages import KvPages
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_batch import PagedBatch, bits_dtype
from tests.pallas_kernels.paged_case import (
    PagedCase,
    make_case,
    oracle,
    oracle_lse,
    quantised,
    relative_errors,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

ALL = pytest.mark.parametrize("implementation", ["cpu", "xla", "reference"])
FAST = pytest.mark.parametrize("implementation", ["cpu", "xla"])
LIMIT = {"float32": 1e-5, "bfloat16": 1e-2}

# (query_len, context_len) of every row: decodes, whole prompts and later chunks, in no order.
MIXED = [(1, 1), (7, 7), (1, 130), (5, 19), (1, 2), (13, 13), (1, 61), (2, 100), (1, 17)]


@functools.partial(
    jax.jit, static_argnames=("scale", "sliding_window", "soft_cap", "implementation")
)
def _attend(
    q: jax.Array,
    pool: jax.Array,
    batch: PagedBatch,
    layer: jax.Array,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    implementation: str,
) -> jax.Array:
    return paged_attention(
        q, pool, batch, layer=layer, scale=scale, sliding_window=sliding_window,
        soft_cap=soft_cap, implementation=implementation,
    )  # fmt: skip


def check(
    case: PagedCase,
    implementation: str,
    *,
    scale: float = 0.31,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> None:
    out = _attend(
        jnp.asarray(case.q), case.device_pool(), case.device_batch(), jnp.int32(case.layer),
        scale=scale, sliding_window=sliding_window, soft_cap=soft_cap,
        implementation=implementation,
    )  # fmt: skip
    assert out.dtype == case.q.dtype and out.shape == case.q.shape
    expected = oracle(case, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap)
    errors = relative_errors(out, case, expected)
    assert (errors < LIMIT[str(case.q.dtype)]).all(), f"token errors {errors}"


@ALL
@pytest.mark.parametrize(
    ("dtype", "window", "soft_cap"),
    [
        ("float32", None, None),
        ("bfloat16", 1, None),
        ("float32", 11, 1.3),
        ("bfloat16", None, 1.3),
    ],
)
def test_mixed_rows(implementation: str, dtype: str, window: int | None, soft_cap: float | None):
    case = make_case(
        MIXED, num_tokens=47, num_rows=13, max_pages=37, num_pages=101, layers=3, dtype=dtype
    )
    check(case, implementation, sliding_window=window, soft_cap=soft_cap)


@ALL
@pytest.mark.parametrize(
    ("q_dtype", "kv_dtype", "as_bits"),
    [
        ("float32", "bfloat16", True),
        ("float32", "bfloat16", False),
        ("bfloat16", "float32", False),
        ("bfloat16", "bfloat16", True),
    ],
)
def test_the_pool_may_have_another_dtype(
    implementation: str, q_dtype: str, kv_dtype: str, as_bits: bool
):
    """As exact as the queries allow: they are not rounded to the pool's type, nor are weights."""
    case = make_case(MIXED, num_tokens=47, num_rows=13, max_pages=37, num_pages=101, dtype=kv_dtype)
    queries = (case.q.astype(np.float32) * np.float32(1.0037)).astype(q_dtype)
    case = dataclasses.replace(case, q=queries)
    held = case.pool.view(bits_dtype(kv_dtype)) if as_bits else case.pool
    out = _attend(
        jnp.asarray(case.q), jnp.asarray(held), case.device_batch(), jnp.int32(case.layer),
        scale=0.31, sliding_window=11, soft_cap=None, implementation=implementation,
    )  # fmt: skip
    assert out.dtype == q_dtype
    errors = relative_errors(out, case, oracle(case, scale=0.31, sliding_window=11))
    assert (errors < LIMIT[q_dtype]).all(), f"token errors {errors}"


@ALL
@pytest.mark.parametrize(
    ("dtype", "q_dtype", "head_dim", "as_bits"),
    [
        ("int8", "float32", 64, False), ("int8", "bfloat16", 20, False),
        ("fp8", "float32", 64, True), ("fp8", "float32", 20, False), ("fp8", "bfloat16", 32, True),
    ],
)  # fmt: skip
def test_a_quantised_pool(
    implementation: str, dtype: str, q_dtype: str, head_dim: int, as_bits: bool
):
    """Exactly what the codes and their scales say; heads of whole vectors and of none."""
    plain = make_case(
        MIXED, num_tokens=47, num_rows=13, max_pages=37, num_pages=101, head_dim=head_dim
    )
    case = quantised(dataclasses.replace(plain, q=plain.q.astype(q_dtype)), dtype)
    if as_bits:
        pool: KvPages = case.pool
        case = dataclasses.replace(case, pool=pool._replace(values=pool.values.view(np.uint8)))
    check(case, implementation, scale=head_dim**-0.5)
    check(case, implementation, scale=head_dim**-0.5, sliding_window=11, soft_cap=1.3)


def test_codes_without_scales_are_refused():
    case = quantised(
        make_case([(1, 9)], num_tokens=1, num_rows=1, max_pages=3, num_pages=3), "int8"
    )
    with pytest.raises(ValueError, match="int8 have scales: give KvPages"):
        paged_attention(
            jnp.asarray(case.q), jnp.asarray(case.pool.values), case.device_batch(), layer=1,
            scale=1.0,
        )  # fmt: skip


@ALL
@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "group", "page_size"),
    [(64, 3, 1, 16), (128, 1, 5, 1), (256, 2, 7, 16), (64, 1, 1, 32)],
)
def test_head_shapes(implementation: str, head_dim: int, kv_heads: int, group: int, page_size: int):
    rows = [(1, 41), (11, 29), (1, 5)]
    case = make_case(
        rows, num_tokens=17, num_rows=5, max_pages=43, num_pages=83, kv_heads=kv_heads,
        group=group, head_dim=head_dim, page_size=page_size, seed=head_dim,
    )  # fmt: skip
    check(case, implementation, scale=head_dim**-0.5)


@FAST
@pytest.mark.parametrize("window", [None, 509])
def test_long_contexts(implementation: str, window: int | None):
    """Many turns of both loops; block and tile borders fall inside and at the ends of rows."""
    rows = [
        (1, 2999), (1, 128), (1, 127), (1, 129), (67, 1031), (64, 256), (1, 1024), (131, 131),
        (1, 257), (1, 3), (1, 1), (65, 2053),
    ]  # fmt: skip
    case = make_case(
        rows, num_tokens=337, num_rows=17, max_pages=211, num_pages=607, page_size=16, head_dim=16
    )
    check(case, implementation, sliding_window=window)


@FAST
def test_long_bfloat16_context(implementation: str):
    case = make_case(
        [(1, 1499), (31, 997)], num_tokens=32, num_rows=2, max_pages=97, num_pages=163,
        page_size=16, head_dim=64, kv_heads=1, dtype="bfloat16",
    )  # fmt: skip
    check(case, implementation, scale=0.125)


@ALL
def test_short_decode_beside_long_ones(implementation: str):
    """A group runs as long as its longest row: the short rows' blocks are unwritten by then."""
    rows = [(1, 1), (1, 2), (1, 601), (1, 3), (1, 300)]
    case = make_case(rows, num_tokens=5, num_rows=5, max_pages=151, num_pages=239, head_dim=8)
    check(case, implementation)
    check(case, implementation, sliding_window=7)


@ALL
@pytest.mark.parametrize("rows", [[], [(1, 9)], [(5, 5)]])
def test_padding_only_or_one_row(implementation: str, rows: list[tuple[int, int]]):
    case = make_case(rows, num_tokens=7, num_rows=3, max_pages=5, num_pages=11)
    check(case, implementation)


@FAST
def test_one_token_bucket(implementation: str):
    check(make_case([(1, 23)], num_tokens=1, num_rows=1, max_pages=7, num_pages=7), implementation)


@ALL
def test_large_scores_do_not_overflow(implementation: str):
    case = make_case(MIXED, num_tokens=47, num_rows=13, max_pages=37, num_pages=101, head_dim=16)
    # Scores of some thousands: sharper softmax, so more of the float32 rounding shows.
    out = _attend(
        jnp.asarray(case.q), jnp.asarray(case.pool), case.device_batch(), jnp.int32(case.layer),
        scale=500.0, sliding_window=None, soft_cap=None, implementation=implementation,
    )  # fmt: skip
    assert relative_errors(out, case, oracle(case, scale=500.0)).max() < 0.01


@FAST
def test_the_layer_may_be_a_constant(implementation: str):
    case = make_case(MIXED, num_tokens=47, num_rows=13, max_pages=37, num_pages=101, layer=0)
    attend = jax.jit(
        functools.partial(paged_attention, layer=0, scale=0.5, implementation=implementation)
    )
    out = attend(jnp.asarray(case.q), jnp.asarray(case.pool), case.device_batch())
    assert relative_errors(out, case, oracle(case, scale=0.5)).max() < 1e-5


@ALL
@pytest.mark.parametrize(
    ("dtype", "window", "soft_cap"), [("float32", None, None), ("bfloat16", 11, 1.3)]
)
def test_log_sum_exp(implementation: str, dtype: str, window: int | None, soft_cap: float | None):
    case = make_case(
        MIXED, num_tokens=47, num_rows=13, max_pages=37, num_pages=101, dtype=dtype, head_dim=16
    )
    rules = {"scale": 0.31, "sliding_window": window, "soft_cap": soft_cap}
    out, lse = paged_attention(
        jnp.asarray(case.q), jnp.asarray(case.pool), case.device_batch(), layer=case.layer,
        return_lse=True, implementation=implementation, **rules,
    )  # fmt: skip
    assert (relative_errors(out, case, oracle(case, **rules)) < LIMIT[dtype]).all()
    assert lse.shape == case.q.shape[:2] and lse.dtype == jnp.float32
    got = np.asarray(lse)[case.tokens()]
    # Absolute: the LSE may be near 0, and what it is used for, exp(), turns absolute into relative.
    np.testing.assert_allclose(got, oracle_lse(case, **rules), rtol=0, atol=3 * LIMIT[dtype])


TOKENS, ROWS, PAGES_PER_ROW, PAGE_SIZE = 29, 7, 11, 8
CAPACITY = PAGES_PER_ROW * PAGE_SIZE


@st.composite
def ragged_rows(draw: st.DrawFn) -> list[tuple[int, int]]:
    budget, rows = TOKENS, []
    for _ in range(draw(st.integers(0, ROWS))):
        if budget == 0:
            break
        query_len = draw(st.one_of(st.just(1), st.integers(1, budget)))
        rows.append((query_len, draw(st.integers(query_len, CAPACITY))))
        budget -= query_len
    return rows


@ALL
@pytest.mark.parametrize("window", [None, 13])
@settings(max_examples=40)
@given(rows=ragged_rows(), seed=st.integers(0, 2**16))
def test_random_batches(
    implementation: str, window: int | None, rows: list[tuple[int, int]], seed: int
):
    case = make_case(
        rows, num_tokens=TOKENS, num_rows=ROWS, max_pages=PAGES_PER_ROW, num_pages=79,
        page_size=PAGE_SIZE, seed=seed,
    )  # fmt: skip
    check(case, implementation, sliding_window=window)
