"""The TPU kernel in the interpreter, against dense float64 attention of every row by itself."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import jax_compat
from pallas_kernels.paged_attention import tpu
from pallas_kernels.paged_attention.tuning import BlockSizes
from tests.pallas_kernels.paged_case import (
    GARBAGE,
    PagedCase,
    joined,
    make_case,
    oracle,
    oracle_lse,
    quantised,
    relative_errors,
)
from tests.pallas_kernels.tpu_interpreter import assert_no_race, strict

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiles")]

LIMIT = {"float32": 1e-5, "bfloat16": 1e-2}
# Small, so that short rows make many turns: 13 query tokens, 32 positions, 16 at once.
SMALL = BlockSizes(query_tokens=13, pages_per_block=2, pages_per_chunk=1)

# (query_len, context_len) of every row: decodes, whole prompts and later chunks, in no order.
MIXED = [(1, 1), (7, 7), (1, 130), (5, 19), (1, 2), (13, 13), (1, 61), (2, 100), (1, 17)]
SIZES: dict[str, Any] = {
    "num_tokens": 47,
    "num_rows": 13,
    "max_pages": 11,
    "num_pages": 37,
    "page_size": 16,
}


@pytest.fixture(autouse=True)
def fresh_interpreter() -> Iterator[None]:
    """A kernel that raised leaves the interpreter's state behind, which fails the next one."""
    yield
    pltpu.reset_tpu_interpret_mode_state()


@functools.partial(
    jax.jit,
    static_argnames=("scale", "sliding_window", "soft_cap", "block_sizes", "interpret"),
)
def _attend(q, pool, batch, layer, **options):
    return tpu.paged_attention(q, pool, batch, layer=layer, return_lse=True, **options)


def check(
    case: PagedCase,
    *,
    scale: float = 0.31,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    block_sizes: BlockSizes | None = SMALL,
    num_cores: int = 1,
    limit: float | None = None,
) -> None:
    """Compare output and log-sum-exp with the oracle's, and look for races."""
    rules = {"scale": scale, "sliding_window": sliding_window, "soft_cap": soft_cap}
    out, lse = _attend(
        jnp.asarray(case.q), case.device_pool(), case.device_batch(), jnp.int32(case.layer),
        block_sizes=block_sizes, interpret=strict(num_cores), **rules,
    )  # fmt: skip
    assert_no_race(out, lse)
    assert out.dtype == case.q.dtype and out.shape == case.q.shape
    limit = limit or LIMIT[str(case.q.dtype)]
    errors = relative_errors(out, case, oracle(case, **rules))
    assert (errors < limit).all(), f"token errors {errors}"
    got = np.asarray(lse)[case.tokens()]
    np.testing.assert_allclose(got, oracle_lse(case, **rules), rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("dtype", "window", "soft_cap"),
    [
        ("float32", None, None),
        ("bfloat16", 1, None),
        ("float32", 11, 1.3),
        ("bfloat16", None, 1.3),
    ],
)
def test_mixed_rows(dtype: str, window: int | None, soft_cap: float | None):
    case = make_case(MIXED, **SIZES, head_dim=64, layers=3, dtype=dtype)
    check(case, sliding_window=window, soft_cap=soft_cap)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "window", "kind"),
    [("float32", 64, None, None), ("bfloat16", 64, 11, None), ("float32", 24, 11, "int8")],
)
def test_keys_and_values_side_by_side(
    dtype: str, head_dim: int, window: int | None, kind: str | None
):
    sizes: dict[str, Any] = SIZES | ({"page_size": 32, "max_pages": 7} if kind else {})
    case = make_case(MIXED, **sizes, head_dim=head_dim, layers=3, kv_heads=3, dtype=dtype)
    check(joined(quantised(case, kind) if kind else case), sliding_window=window)


@pytest.mark.parametrize(
    ("dtype", "q_dtype", "window"), [("int8", "float32", None), ("fp8", "bfloat16", 11)]
)
def test_a_quantised_pool(dtype: str, q_dtype: str, window: int | None):
    """Scales of slots that no token was written to are NaN, and so are pages not fetched."""
    sizes: dict[str, Any] = SIZES | {"page_size": 32, "max_pages": 7}
    plain = make_case(MIXED, **sizes, head_dim=64, kv_heads=3)
    case = quantised(dataclasses.replace(plain, q=plain.q.astype(q_dtype)), dtype)
    check(case, sliding_window=window, soft_cap=None if window is None else 1.3,
          block_sizes=SMALL._replace(pages_per_block=4, pages_per_chunk=2))  # fmt: skip


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "group", "page_size", "dtype"),
    [
        (64, 3, 3, 16, "bfloat16"),
        (64, 2, 1, 128, "float32"),
        (128, 1, 5, 64, "float32"),
        (128, 4, 7, 32, "bfloat16"),
        (256, 1, 4, 16, "bfloat16"),
        (256, 1, 2, 8, "float32"),
    ],
)
def test_head_shapes(head_dim: int, kv_heads: int, group: int, page_size: int, dtype: str):
    rows = [(1, 41), (11, 29), (1, 5)]
    case = make_case(
        rows, num_tokens=17, num_rows=5, max_pages=6, num_pages=13, kv_heads=kv_heads,
        group=group, head_dim=head_dim, page_size=page_size, seed=head_dim, dtype=dtype,
    )  # fmt: skip
    check(case, scale=head_dim**-0.5)


@pytest.mark.parametrize(("window", "dtype"), [(None, "float32"), (509, "bfloat16")])
def test_long_contexts(window: int | None, dtype: str):
    """Block, chunk and tile borders fall inside and at the ends of rows; heuristic sizes."""
    rows = [(1, 1999), (1, 128), (1, 127), (1, 129), (67, 1031), (64, 256), (1, 512), (1, 3)]
    case = make_case(
        rows, num_tokens=139, num_rows=11, max_pages=17, num_pages=41, page_size=128, head_dim=64,
        kv_heads=1, group=2, dtype=dtype,
    )  # fmt: skip
    check(case, scale=0.125, sliding_window=window, block_sizes=None)


@pytest.mark.parametrize("window", [None, 19])
def test_two_cores(window: int | None, monkeypatch: pytest.MonkeyPatch):
    """The cores of a v4 or v5p take query blocks in turn, and prefetch each for itself."""
    monkeypatch.setattr(jax_compat, "tpu_core_count", lambda: 2)
    rows = [*MIXED, (21, 77)]
    sizes: dict[str, Any] = SIZES | {"num_tokens": 79}
    case = make_case(rows, **sizes, head_dim=32)
    check(case, sliding_window=window, num_cores=2, block_sizes=SMALL._replace(query_tokens=11))


@pytest.mark.parametrize("num_tokens", [3, 11, 23])
def test_two_cores_and_work_for_one(num_tokens: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax_compat, "tpu_core_count", lambda: 2)
    case = make_case(
        [(1, 19), (2, 5)], num_tokens=num_tokens, num_rows=3, max_pages=2, num_pages=5,
        page_size=16, head_dim=32,
    )  # fmt: skip
    check(case, num_cores=2)


@pytest.mark.parametrize("rows", [[], [(1, 9)], [(5, 5)], [(1, 33)] * 7])
def test_padding_only_one_row_and_a_full_bucket(rows: list[tuple[int, int]]):
    case = make_case(
        rows, num_tokens=7, num_rows=7, max_pages=5, num_pages=23, page_size=16, head_dim=32
    )
    check(case)


def test_one_token_bucket():
    case = make_case(
        [(1, 23)], num_tokens=1, num_rows=1, max_pages=2, num_pages=7, page_size=16, head_dim=32
    )
    check(case)


def test_pages_out_of_sight_are_not_read():
    """What lies before the window may belong to somebody else by now, as may its pages."""
    rows = [(1, 161), (9, 150)]
    case = make_case(
        rows, num_tokens=10, num_rows=2, max_pages=11, num_pages=23, page_size=16, head_dim=32
    )
    window = 23
    for row, (query_len, context_len) in enumerate(rows):
        gone = (context_len - query_len + 1 - window) // 16
        assert gone > 0
        case.batch.page_table[row, :gone] = GARBAGE[row]  # an access would be out of bounds
    check(case, sliding_window=window)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_request_of_nan_does_not_reach_its_neighbours(poison: float):
    """Blocks of the next rows are not full, and the rest of the buffer is the poisoned row's."""
    rows = [(1, 64), (1, 3), (64, 64), (1, 17), (3, 35)]
    case = make_case(
        rows, num_tokens=70, num_rows=5, max_pages=4, num_pages=23, page_size=16, head_dim=32
    )
    for row in (0, 2):
        case.pool[case.layer, case.batch.page_table[row]] = poison
    out = _attend(
        jnp.asarray(case.q), jnp.asarray(case.pool), case.device_batch(), case.layer,
        block_sizes=SMALL._replace(pages_per_block=4, pages_per_chunk=4), interpret=strict(),
        scale=0.31,
    )[0]  # fmt: skip
    errors = relative_errors(out, case, oracle(case, scale=0.31))
    healthy = [1, 66, 67, 68, 69]
    assert (errors[healthy] < 1e-5).all()
    assert np.isnan(errors).sum() == 65


@pytest.mark.parametrize(
    ("q_dtype", "kv_dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_the_pool_may_have_another_dtype(q_dtype: str, kv_dtype: str):
    case = make_case(MIXED, **SIZES, head_dim=32, dtype="bfloat16")
    q, pool = jnp.asarray(case.q, q_dtype), jnp.asarray(case.pool, kv_dtype)
    out = _attend(
        q, pool, case.device_batch(), case.layer, scale=0.31, block_sizes=SMALL,
        interpret=strict(),
    )[0]  # fmt: skip
    assert out.dtype == q_dtype
    assert (relative_errors(out, case, oracle(case, scale=0.31)) < LIMIT[q_dtype]).all()


def test_the_window_may_be_traced():
    case = make_case(MIXED, **SIZES, head_dim=32)

    @jax.jit
    def attend(window):
        return tpu.paged_attention(
            jnp.asarray(case.q), jnp.asarray(case.pool), case.device_batch(), layer=case.layer,
            scale=0.31, sliding_window=window, block_sizes=SMALL, interpret=strict(),
        )  # fmt: skip

    expected = oracle(case, scale=0.31, sliding_window=19)
    assert (relative_errors(attend(jnp.int32(19)), case, expected) < 1e-5).all()


def test_large_scores_do_not_overflow():
    case = make_case(MIXED, **SIZES, head_dim=32)
    # Scores of some thousands: sharper softmax, so more of the float32 rounding shows.
    check(case, scale=500.0, limit=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 8, "dtype": "bfloat16"}, "multiple of 16 slots of bfloat16, not 8"),
        ({"max_pages": 2**17}, "bytes of scalar memory"),
    ],
)
def test_refusals(change: dict, message: str):
    case = make_case([(1, 9)], **{**SIZES, "num_tokens": 5, "num_rows": 2, **change})
    with pytest.raises(ValueError, match=message):
        _attend(case.q, case.pool, case.batch, 0, scale=1.0)


def test_refusals_of_queries():
    case = make_case([(1, 9)], **SIZES, head_dim=32)
    with pytest.raises(ValueError, match="not float16"):
        _attend(case.q.astype(np.float16), case.pool, case.batch, 0, scale=1.0)
    for q in (case.q[:, :5], case.q[..., :16]):
        with pytest.raises(ValueError, match="do not fit 2 KV heads of size 32"):
            _attend(q, case.pool, case.batch, 0, scale=1.0)


TOKENS, ROWS, PAGES_PER_ROW = 29, 7, 5
CAPACITY = PAGES_PER_ROW * 16


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


@pytest.mark.parametrize("window", [None, 13])
@settings(max_examples=12)
@given(rows=ragged_rows(), seed=st.integers(0, 2**16))
def test_random_batches(window: int | None, rows: list[tuple[int, int]], seed: int):
    case = make_case(
        rows, num_tokens=TOKENS, num_rows=ROWS, max_pages=PAGES_PER_ROW, num_pages=37,
        page_size=16, head_dim=32, kv_heads=2, group=2, seed=seed,
    )  # fmt: skip
    check(case, sliding_window=window, block_sizes=SMALL._replace(query_tokens=8))
