"""Ragged paged batches full of traps, and attention over them in plain float64 numpy."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.kv_pages import KvPages
from pallas_kernels.paged_batch import PagedBatch

GARBAGE = (-7, 10**6, 2**31 - 1, -(2**31))  # page numbers that are none


@dataclasses.dataclass(frozen=True)
class PagedCase:
    """One call's inputs, and the dense KV of every row that the oracle works from.

    Attributes:
        q: [tokens, heads, head_dim]; NaN where padding.
        pool: [layers, pages, 2, kv_heads, page_size, head_dim]; NaN wherever no row's token is.
            Quantised it is `KvPages`, whose scales are NaN there.
        batch: int32 arrays as `PagedBatch` describes them.
        context: per row float64 [2, kv_heads, context_len, head_dim].
        layer: the layer whose pages hold the rows' KV; all others are NaN.
    """

    q: np.ndarray
    pool: Any
    batch: PagedBatch
    context: list[np.ndarray]
    layer: int

    def device_batch(self) -> PagedBatch:
        return PagedBatch(*(jnp.asarray(field) for field in self.batch))

    def device_pool(self) -> Any:
        return jax.tree.map(jnp.asarray, self.pool)

    def tokens(self) -> np.ndarray:
        """Indices of the real tokens."""
        rows = zip(self.batch.query_start, self.batch.query_len, strict=True)
        return np.concatenate([np.arange(s, s + n) for s, n in rows] + [np.zeros(0, int)])


def make_case(
    rows: Sequence[tuple[int, int]],
    *,
    num_tokens: int,
    num_rows: int,
    max_pages: int,
    num_pages: int,
    kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 8,
    page_size: int = 4,
    layers: int = 2,
    layer: int = 1,
    dtype: str = "float32",
    seed: int = 0,
) -> PagedCase:
    """A batch of rows (query_len, context_len), in that order, on shuffled pages."""
    random = np.random.default_rng(seed)
    cast = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32).astype(cast)

    shape = (layers, num_pages, 2, kv_heads, page_size, head_dim)
    pool = np.full(shape, np.nan, cast)
    q = np.full((num_tokens, kv_heads * group, head_dim), np.nan, cast)
    starts, lens, ends = (np.zeros(num_rows, np.int32) for _ in range(3))
    table = random.choice(np.array(GARBAGE, np.int64), (num_rows, max_pages)).astype(np.int32)
    free = random.permutation(num_pages)
    context, token = [], 0
    for i, (query_len, context_len) in enumerate(rows):
        starts[i], lens[i], ends[i] = token, query_len, context_len
        q[token : token + query_len] = draw(query_len, *q.shape[1:])
        token += query_len
        pages, free = np.split(free, [-(-context_len // page_size)])
        table[i, : len(pages)] = pages
        kv = draw(2, kv_heads, context_len, head_dim)
        for position in range(context_len):
            page, offset = divmod(position, page_size)
            pool[layer, pages[page], :, :, offset] = kv[:, :, position]
        context.append(kv.astype(np.float64))
    return PagedCase(q, pool, PagedBatch(starts, lens, ends, table), context, layer)  # type: ignore[arg-type]


def quantised_rows(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of float32 rows [..., D], by the specification, in NumPy."""
    most = np.float32(127 if dtype == "int8" else 448)
    scales = np.abs(x).max(-1) * np.float32(1 / most)
    numbers = np.clip(x / np.where(scales == 0, np.float32(1), scales)[..., None], -most, most)
    kind = np.int8 if dtype == "int8" else ml_dtypes.float8_e4m3fn
    return (np.rint(numbers) if dtype == "int8" else numbers).astype(kind), scales


def quantised(case: PagedCase, dtype: str) -> PagedCase:
    """A case of which the pool is "int8" or "fp8"; its context is what the codes stand for."""
    written = ~np.isnan(case.pool).any(-1)
    codes, scales = quantised_rows(np.nan_to_num(case.pool.astype(np.float32)), dtype)
    codes[~written] = 99  # of another request, in unwritten slots and the other layers
    scales[~written] = np.nan
    context = []
    for kv in case.context:
        own, its_scales = quantised_rows(kv.astype(np.float32), dtype)
        context.append(own.astype(np.float64) * its_scales[..., None].astype(np.float64))
    return dataclasses.replace(case, pool=KvPages(codes, scales), context=context)


def side_by_side(values: np.ndarray) -> np.ndarray:
    """A pool's values with K and V side by side."""
    return np.concatenate([values[:, :, :1], values[:, :, 1:]], axis=-1)


def joined(case: PagedCase) -> PagedCase:
    """A case whose pool has K and V side by side."""
    pool = case.pool
    if isinstance(pool, KvPages):
        return dataclasses.replace(case, pool=pool._replace(values=side_by_side(pool.values)))
    return dataclasses.replace(case, pool=side_by_side(pool))


def oracle(
    case: PagedCase,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> np.ndarray:
    """Attention of the real tokens, one token and head at a time: float64 [real, heads, D]."""
    return _oracle(case, scale, sliding_window, soft_cap)[0]


def oracle_lse(
    case: PagedCase,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> np.ndarray:
    """The logarithm of the sum of exp(scores) of the real tokens: float64 [real, heads]."""
    return _oracle(case, scale, sliding_window, soft_cap)[1]


def _oracle(
    case: PagedCase, scale: float, sliding_window: int | None, soft_cap: float | None
) -> tuple[np.ndarray, np.ndarray]:
    heads = case.q.shape[1]
    group = heads // case.pool.shape[3]
    out, lse = [], []
    for row, (keys, values) in enumerate(case.context):
        start, length = case.batch.query_start[row], case.batch.query_len[row]
        first = int(case.batch.context_len[row] - length)
        for i in range(length):
            end = first + i + 1
            begin = 0 if sliding_window is None else max(0, end - sliding_window)
            for head in range(heads):
                query = case.q[start + i, head].astype(np.float64)
                scores = keys[head // group, begin:end] @ query * scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                weights = np.exp(scores - scores.max())
                out.append(weights / weights.sum() @ values[head // group, begin:end])
                lse.append(scores.max() + np.log(weights.sum()))
    return np.array(out).reshape(-1, heads, case.q.shape[2]), np.array(lse).reshape(-1, heads)


def relative_errors(out: jax.Array, case: PagedCase, expected: np.ndarray) -> np.ndarray:
    """||out - expected|| / ||expected|| of every real token: float64 [real]."""
    got = np.asarray(out).astype(np.float64)[case.tokens()]
    norm = np.linalg.norm(expected, axis=(1, 2))
    return np.linalg.norm(got - expected, axis=(1, 2)) / norm
