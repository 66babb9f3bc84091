"""A pool with K and V side by side is written and read in plain XLA as one with them apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_pages import KvPages, head_dim_of, is_joined, join, pool_parts, separate
from pallas_kernels.kv_write import kv_write
from pallas_kernels.paged_attention import paged_attention
from tests.pallas_kernels.paged_case import joined, make_case, quantised

ROWS = [(1, 1), (7, 7), (1, 30), (5, 19)]


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_written_and_read_as_apart(implementation: str, kind: str | None) -> None:
    case = make_case(ROWS, num_tokens=17, num_rows=5, max_pages=9, num_pages=29)
    case = case if kind is None else quantised(case, kind)
    rng = np.random.default_rng(5)
    k, v = (jnp.asarray(rng.standard_normal((17, 2, 8), np.float32)) for _ in range(2))
    batch, outs, pools = case.device_batch(), [], []
    for one in (case, joined(case)):
        pool = kv_write(one.device_pool(), k, v, batch, layer=1, implementation=implementation)
        out = paged_attention(
            jnp.asarray(case.q), pool, batch, layer=1, scale=0.3, implementation=implementation
        )
        pools.append(pool)
        outs.append(np.asarray(out)[case.tokens()])
    np.testing.assert_array_equal(*outs)
    assert is_joined(pools[1]) and head_dim_of(pools[1]) == head_dim_of(pools[0]) == 8
    apart, together = (p.values if isinstance(p, KvPages) else p for p in pools)
    np.testing.assert_array_equal(np.asarray(separate(together)), np.asarray(apart))


@pytest.mark.parametrize("implementation", ["cpu", "gpu"])
def test_kernels_that_address_memory_refuse_it(implementation: str) -> None:
    case = joined(make_case(ROWS, num_tokens=17, num_rows=5, max_pages=9, num_pages=29))
    with pytest.raises(ValueError, match="takes K and V apart"):
        paged_attention(
            jnp.asarray(case.q), case.device_pool(), case.device_batch(), layer=1, scale=0.3,
            implementation=implementation,
        )  # fmt: skip


def test_parts() -> None:
    assert pool_parts(64, joined=True) == (1, 128) and pool_parts(64, joined=False) == (2, 64)
    kv = jax.random.normal(jax.random.key(0), (3, 2, 5, 7))
    np.testing.assert_array_equal(join(kv)[:, 0, :, :7], kv[:, 0])
    np.testing.assert_array_equal(join(kv)[:, 0, :, 7:], kv[:, 1])
