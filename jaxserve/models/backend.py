"""Where models meet the kernels: write this step's KV and attend on every mesh shard; multiply."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import Linear
from jaxserve.models.weights import axes_of, multiply
from jaxserve.parallel.mesh import ShardingRules
from pallas_kernels import linear as products
from pallas_kernels.kv_pages import KvPool
from pallas_kernels.kv_write import kv_write
from pallas_kernels.linear import Activations
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_batch import PagedBatch, bits_dtype
from pallas_kernels.weights import Format, Quantised

Product = Callable[[jax.Array, jax.Array | Quantised], jax.Array]  # of activations and a weight


@dataclasses.dataclass(frozen=True)
class KernelBackend:
    """How attention and linear layers run: on which mesh, with which implementations.

    Kernels work on one shard's own tokens, pages and KV heads, and need nobody else's.

    Attributes:
        rules: the mesh, and what is split over it.
        implementation: of `paged_attention`.
        loop_layers: share one attention between all layers (`Decoder`), which takes an
            implementation whose layer and window may be traced values.
        linear_implementation: of `pallas_kernels.linear`.
        activations: what quantised weights multiply, see there.
    """

    rules: ShardingRules
    implementation: str
    loop_layers: bool = False
    linear_implementation: str = "xla"
    activations: Activations = "float"

    @property
    def kv_write_implementation(self) -> str:
        """The KV write beside it: on a TPU its kernel; GPUs and CPUs scatter in place."""
        return "tpu" if self.implementation == "tpu" else "xla"

    def pool_dtype(self, kv_dtype: np.dtype) -> np.dtype:
        """The type of the array that holds a pool's values of `kv_dtype`, of the same size.

        On a CPU they are held as bits (`paged_batch.bits_dtype`). The kernels of other devices,
        which a CPU may interpret, take them as what they are.
        """
        on_cpu = self.rules.mesh.devices.flat[0].platform == "cpu"
        as_bits = on_cpu and self.implementation not in ("tpu", "gpu")
        return bits_dtype(kv_dtype) if as_bits else kv_dtype

    def linear(
        self, x: jax.Array, weight: nnx.Param, num_tokens: jax.Array | None = None
    ) -> jax.Array:
        """x [tokens, in] times weight [out..., in] -> [tokens, out...].

        Args:
            x: activations.
            weight: in any form.
            num_tokens: int32 [], how many tokens there are before padding begins: what it comes
                to may be left out. None: all are.
        """

        def own(x: jax.Array, weight: jax.Array | Quantised) -> jax.Array:
            format = weight.format if isinstance(weight, Quantised) else None
            return products.linear(
                x,
                weight,
                implementation=self.linear_implementation,
                activations=self.activations_for(format),
                num_tokens=num_tokens,
            )

        is_split = self.rules.mesh.size > 1
        product = self._on_shards(own, weight.get_metadata()["axes"]) if is_split else own
        return multiply(x, weight.get_value(), product)

    def _on_shards(self, product: Product, axes: Sequence[str | None]) -> Product:
        """A product of every shard with its own part of a weight; one sum, if inputs are split.

        XLA splits products of arrays by itself. It sees neither into calls of kernels nor that
        blocks of codes and their scales belong together.

        Args:
            product: of one shard.
            axes: logical axes of the weight, [out..., in].
        """
        inputs = self.rules.spec(axes[-1:])[0]

        def on_shard(x: jax.Array, weight: jax.Array | Quantised) -> jax.Array:
            out = product(x, weight)
            return out if inputs is None else jax.lax.psum(out, inputs)

        def on_mesh(x: jax.Array, weight: jax.Array | Quantised) -> jax.Array:
            is_kernel = self.linear_implementation not in products.SPLIT_BY_XLA
            if not (is_kernel or isinstance(weight, Quantised)):
                return product(x, weight)
            return jax.shard_map(
                on_shard,
                mesh=self.rules.mesh,
                in_specs=(
                    self.rules.spec(("data", axes[-1])),
                    jax.tree.map(lambda a: self.rules.spec(axes_of(a, weight, axes)), weight),
                ),
                out_specs=self.rules.spec(("data", *axes[:-1])),
                check_vma=False,  # kernels' loops carry per-shard values
            )(x, weight)

        return on_mesh

    def activations_for(self, format: Format | None) -> Activations:
        """What weights of a format (None: not quantised) multiply: int8 takes integer codes."""
        has_codes = format is not None and format.codes.startswith("int")
        return self.activations if has_codes else "float"

    def linear_of(self, num_tokens: jax.Array) -> Linear:
        """`linear` for activations of so many tokens, padded; over a mesh each shard is padded."""
        if self.rules.mesh.size > 1:
            return self.linear
        return functools.partial(self.linear, num_tokens=num_tokens)

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        kv_pages: KvPool,
        batch: PagedBatch,
        *,
        config: ModelConfig,
        layer: int | jax.Array,
        sliding_window: int | jax.Array | None,
    ) -> tuple[jax.Array, KvPool]:
        """Store k and v, then attend.

        Args:
            q: [tokens, kv_heads, group, head_dim].
            k, v: [tokens, kv_heads, head_dim].
            kv_pages: the pool; see `PagedBatch`.
            batch: rows, numbered within their data shard.
            config: gives the scale and the soft cap.
            layer, sliding_window: see `paged_attention`.

        Returns:
            [tokens, kv_heads, group, head_dim], and the pool with k and v in it.
        """

        def on_shard(q, k, v, kv_pages, batch, layer, window):
            kv_pages = kv_write(
                kv_pages, k, v, batch, layer=layer, implementation=self.kv_write_implementation
            )
            out = paged_attention(
                q.reshape(q.shape[0], -1, q.shape[-1]),
                kv_pages,
                batch,
                layer=layer,
                scale=config.scale,
                sliding_window=window,
                soft_cap=config.attention_soft_cap,
                implementation=self.implementation,
            )
            return out.reshape(q.shape), kv_pages

        if self.rules.mesh.size == 1:
            return on_shard(q, k, v, kv_pages, batch, layer, sliding_window)
        spec = self.rules.spec
        queries, keys = spec(("data", "kv_heads", None, None)), spec(("data", "kv_heads", None))
        pool = kv_pages_spec(self.rules)
        per_row, table = PartitionSpec("data"), PartitionSpec("data", None)
        rows = PagedBatch._make((per_row, per_row, per_row, table))
        everywhere = PartitionSpec()
        return jax.shard_map(
            on_shard,
            mesh=self.rules.mesh,
            in_specs=(queries, keys, keys, pool, rows, everywhere, everywhere),
            out_specs=(queries, pool),
            check_vma=False,  # loops with run-time trip counts carry per-shard values
        )(q, k, v, kv_pages, batch, layer, sliding_window)


def kv_pages_spec(rules: ShardingRules) -> PartitionSpec:
    """How values and scales of the KV pool are split: pages over data, heads over tensor."""
    return rules.spec((None, "data", None, "kv_heads"))
