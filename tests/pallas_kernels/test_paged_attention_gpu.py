"""The Hopper kernels in Mosaic GPU's interpreter, against dense float64 attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.gpu import paged_attention
from pallas_kernels.paged_attention.gpu_tiles import GpuTiles, gpu_tiles
from pallas_kernels.paged_batch import PagedBatch
from tests.pallas_kernels.paged_case import (
    PagedCase,
    make_case,
    oracle,
    oracle_lse,
    relative_errors,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"),
    reason="Mosaic GPU's interpreter is public from JAX 0.11 (Python 3.12)",
)

# (query_len, context_len) of every row: decodes, whole prompts and later chunks, in no order.
MIXED = [(1, 1), (7, 7), (1, 130), (45, 101), (1, 64), (1, 65), (2, 100)]


def few_blocks(head_dim: int, decode_blocks: int = 3, prefill_blocks: int = 2) -> GpuTiles:
    """The real block sizes, on a GPU so small that every block has several items."""
    return dataclasses.replace(
        gpu_tiles(head_dim, num_cores=1),
        decode_blocks=decode_blocks, prefill_blocks=prefill_blocks, decode_share=1,
    )  # fmt: skip


def attend(
    case: PagedCase, tiles: GpuTiles, detect_races: bool = False, **options
) -> tuple[np.ndarray, np.ndarray]:
    @jax.jit
    def run(q: jax.Array, pool: jax.Array, batch: PagedBatch, layer: jax.Array):
        return paged_attention(q, pool, batch, layer=layer, return_lse=True, tiles=tiles, **options)

    interpreter = plgpu.InterpretGPUParams(detect_races=detect_races)  # type: ignore[attr-defined]
    with plgpu.force_gpu_interpret_mode(interpreter):  # type: ignore[attr-defined]
        out, lse = run(
            jnp.asarray(case.q), jnp.asarray(case.pool), case.device_batch(), jnp.int32(case.layer)
        )
        return np.asarray(out), np.asarray(lse)


def check(
    case: PagedCase,
    tiles: GpuTiles,
    *,
    scale: float = 0.13,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> None:
    options = dict(scale=scale, sliding_window=sliding_window, soft_cap=soft_cap)
    out, lse = attend(case, tiles, **options)  # type: ignore[arg-type]
    assert out.dtype == case.q.dtype and out.shape == case.q.shape
    errors = relative_errors(jnp.asarray(out), case, oracle(case, **options))  # type: ignore[arg-type]
    assert (errors < 1e-2).all(), f"token errors {errors}"
    assert lse.dtype == np.float32
    expected = oracle_lse(case, **options)  # type: ignore[arg-type]
    np.testing.assert_allclose(lse[case.tokens()], expected, atol=2e-3)
    padding = np.ones(len(lse), bool)
    padding[case.tokens()] = False
    assert (lse[padding] == -np.inf).all()


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (1, None), (37, 1.3)])
def test_mixed_rows(window: int | None, soft_cap: float | None):
    case = make_case(
        MIXED, num_tokens=61, num_rows=11, max_pages=37, num_pages=67, kv_heads=2, group=3,
        head_dim=64, page_size=16, dtype="bfloat16",
    )  # fmt: skip
    check(case, few_blocks(64), sliding_window=window, soft_cap=soft_cap)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "group", "page_size", "window"),
    [
        (128, 2, 4, 64, None), (256, 1, 4, 128, 70), (64, 3, 1, 32, None), (128, 1, 7, 16, 31),
        (64, 1, 8, 128, None), (64, 1, 12, 64, None),
    ],
)  # fmt: skip
def test_head_and_page_shapes(
    head_dim: int, kv_heads: int, group: int, page_size: int, window: int | None
):
    rows = [(1, 141), (23, 159), (1, 5), (19, 19)]
    case = make_case(
        rows, num_tokens=47, num_rows=5, max_pages=11, num_pages=37, kv_heads=kv_heads,
        group=group, head_dim=head_dim, page_size=page_size, dtype="bfloat16", seed=group,
    )  # fmt: skip
    check(case, few_blocks(head_dim), scale=head_dim**-0.5, sliding_window=window)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize(("blocks", "window"), [(1, 389), (5, None), (16, 389)])
def test_decode_contexts_split_over_blocks(blocks: int, window: int | None):
    """A context in one block, over two, over many; short ones beside it; windows as well."""
    rows = [(1, 3), (1, 1337), (1, 64), (1, 301), (1, 1)]
    case = make_case(
        rows, num_tokens=5, num_rows=7, max_pages=29, num_pages=41, kv_heads=1, group=4,
        head_dim=64, page_size=64, dtype="bfloat16",
    )  # fmt: skip
    check(case, few_blocks(64, decode_blocks=blocks), sliding_window=window)


@pytest.mark.slow
@interpreted
def test_long_prompts():
    """Tiles seen wholly, cut by causality and cut by the window, more of them than stages."""
    case = make_case(
        [(131, 700), (1, 3), (67, 67)], num_tokens=211, num_rows=3, max_pages=13, num_pages=17,
        kv_heads=1, group=2, head_dim=64, page_size=64, dtype="bfloat16",
    )  # fmt: skip
    check(case, few_blocks(64), sliding_window=200)


@interpreted
@pytest.mark.parametrize("rows", [[], [(1, 9)], [(5, 5)]])
def test_padding_only_or_one_row(rows: list[tuple[int, int]]):
    case = make_case(
        rows, num_tokens=7, num_rows=3, max_pages=2, num_pages=5, head_dim=64, page_size=16,
        dtype="bfloat16",
    )  # fmt: skip
    check(case, few_blocks(64))


@interpreted
def test_one_token_bucket():
    case = make_case(
        [(1, 23)], num_tokens=1, num_rows=1, max_pages=3, num_pages=3, head_dim=64, page_size=16,
        dtype="bfloat16",
    )  # fmt: skip
    check(case, few_blocks(64))


@pytest.mark.slow
@interpreted
def test_no_races(capfd: pytest.CaptureFixture[str]):
    """Every read of shared memory is ordered behind the copy or store that it needs."""
    case = make_case(
        [(1, 200), (45, 101), (1, 64), (2, 130)], num_tokens=53, num_rows=5, max_pages=15,
        num_pages=41, kv_heads=2, group=3, head_dim=64, page_size=16, dtype="bfloat16",
    )  # fmt: skip
    out, _ = attend(case, few_blocks(64), detect_races=True, scale=0.1)
    assert relative_errors(jnp.asarray(out), case, oracle(case, scale=0.1)).max() < 1e-2
    assert "RACE DETECTED" not in capfd.readouterr().out


@interpreted
def test_float16():
    case = make_case(
        [(1, 99), (9, 30)], num_tokens=11, num_rows=3, max_pages=7, num_pages=11, head_dim=64,
        page_size=16,
    )  # fmt: skip
    half = dataclasses.replace(case, q=case.q.astype(np.float16), pool=case.pool.astype(np.float16))
    check(half, few_blocks(64))


@pytest.mark.parametrize(
    ("head_dim", "page_size", "heads", "dtype", "message"),
    [
        (64, 16, 4, "float32", "bfloat16 or float16"),
        (96, 16, 4, "bfloat16", "head_dim 64, 128 or 256, not 96"),
        (64, 48, 4, "bfloat16", "pages of .*, not 48"),
        (64, 4, 4, "bfloat16", "pages of .*, not 4"),
        (64, 16, 5, "bfloat16", "5 for 2"),
        (64, 16, 4, "float32 bfloat16", "one dtype, not float32 and bfloat16"),
    ],
)
def test_what_cannot_work_is_refused(
    head_dim: int, page_size: int, heads: int, dtype: str, message: str
):
    one = jnp.zeros(1, jnp.int32)
    batch = PagedBatch(one, one, one, one[:, None])
    with pytest.raises(ValueError, match=message):
        functools.partial(paged_attention, layer=0, scale=1.0)(
            jnp.zeros((1, heads, head_dim), dtype.split()[0]),
            jnp.zeros((1, 1, 2, 2, page_size, head_dim), dtype.split()[-1]),
            batch,
        )
