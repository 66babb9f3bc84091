"""Where models meet the kernels: write this step's KV, then attend, on every mesh shard."""

import dataclasses

import jax
from jax.sharding import PartitionSpec

from jaxserve.parallel.mesh import ShardingRules
from pallas_kernels.kv_write import kv_write
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_batch import PagedBatch


@dataclasses.dataclass(frozen=True)
class AttentionBackend:
    """How attention runs: on which mesh, with which implementation.

    Kernels work on one shard's own tokens, pages and KV heads, and need nobody else's.
    """

    rules: ShardingRules
    implementation: str

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        kv_pages: jax.Array,
        batch: PagedBatch,
        *,
        layer: int,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Store k and v, then attend.

        Args:
            q: [tokens, kv_heads, group, head_dim].
            k, v: [tokens, kv_heads, head_dim].
            kv_pages: the pool; see `PagedBatch`.
            batch: rows, numbered within their data shard.
            layer, scale, sliding_window, soft_cap: see `paged_attention`.

        Returns:
            [tokens, kv_heads, group, head_dim], and the pool with k and v in it.
        """

        def on_shard(q, k, v, kv_pages, batch):
            kv_pages = kv_write(kv_pages, k, v, batch, layer=layer)
            out = paged_attention(
                q.reshape(q.shape[0], -1, q.shape[-1]),
                kv_pages,
                batch,
                layer=layer,
                scale=scale,
                sliding_window=sliding_window,
                soft_cap=soft_cap,
                implementation=self.implementation,
            )
            return out.reshape(q.shape), kv_pages

        if self.rules.mesh.size == 1:
            return on_shard(q, k, v, kv_pages, batch)
        spec = self.rules.spec
        queries, keys = spec(("data", "kv_heads", None, None)), spec(("data", "kv_heads", None))
        pool = kv_pages_spec(self.rules)
        rows = PagedBatch(*[PartitionSpec("data")] * 3, PartitionSpec("data", None))
        return jax.shard_map(
            on_shard,
            mesh=self.rules.mesh,
            in_specs=(queries, keys, keys, pool, rows),
            out_specs=(queries, pool),
            check_vma=False,  # loops with run-time trip counts carry per-shard values
        )(q, k, v, kv_pages, batch)


def kv_pages_spec(rules: ShardingRules) -> PartitionSpec:
    """How the KV pool is split: pages over data, heads over tensor."""
    return rules.spec((None, None, "kv_heads", "data", None, None))
