"""The programs of a step, lowered for devices and arrays that need not exist.

Only shapes, types and placements go in. The runner compiles what comes out for the devices it
has; `ahead_of_time` compiles the same for devices that are somewhere else.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Lowered

from jaxserve.cache.page_layout import PageLayout
from jaxserve.models.backend import kv_pages_spec
from jaxserve.models.kv_bytes import joins_kv, page_bytes
from jaxserve.models.weights import Storage
from jaxserve.parallel.mesh import ShardingRules
from jaxserve.runner.logit_programs import EDIT_FIELDS, edit_logits, max_edits, token_logprobs
from jaxserve.runner.packing import packed_length
from jaxserve.runner.page_programs import (
    COPIES,
    copy_pages,
    gather_pages,
    piece_sizes,
    scatter_pages,
)
from jaxserve.runner.step_program import StepProgram
from pallas_kernels.kv_pages import SCALE_DTYPE, KvPages, is_quantised, pool_parts
from pallas_kernels.paged_batch import pool_format

Abstract = jax.ShapeDtypeStruct
AbstractPool = Abstract | KvPages  # of two of these


@dataclasses.dataclass(frozen=True)
class StepLowering:
    """A step's functions together with everything that shapes their arguments.

    Attributes:
        program: the step's pure functions; the mesh is its backend's.
        dtype: type of weights and activations.
        num_pages: pages of the KV pool, over all data shards.
        page_size: tokens per page.
        kv_dtype: type of the values in the KV pool; 8 bits have scales (`KvPages`).
        storage: how weights are held that are not one array each.
    """

    program: StepProgram
    dtype: np.dtype
    num_pages: int
    page_size: int
    kv_dtype: np.dtype
    storage: Mapping[str, Storage] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def span_kinds(self) -> tuple[int, ...]:
        """For each span the first one that is like it: these share their programs.

        Alike are spans with equal layers in the same order, whose weights are held alike.
        """
        spans = self.program.spans
        kinds = [(span.graph.config, span.own(self.storage)) for span in spans]
        return tuple(map(kinds.index, kinds))

    @property
    def rules(self) -> ShardingRules:
        """The mesh and its placements."""
        return self.program.backend.rules

    # -- what the programs keep on the devices --------------------------------------------

    @property
    def params(self) -> dict[str, Any]:
        """The weights by name, see `models.weights`."""
        return self.program.graph.abstract_params(self.rules, self.dtype, self.storage)

    @property
    def page_dtype(self) -> np.dtype:
        """What the pool's values, in pages anywhere, are made of: `kv_dtype`, or its bits."""
        return self.program.backend.pool_dtype(self.kv_dtype)

    @property
    def kv_pages(self) -> AbstractPool:
        """The KV pool; see `PagedBatch` and `KvPages`."""
        config = self.program.graph.config
        parts, width = pool_parts(config.head_dim, joined=joins_kv(config, self.rules))
        shape = (
            config.num_layers, self.num_pages, parts, config.num_kv_heads, self.page_size, width,
        )  # fmt: skip
        sharding = NamedSharding(self.rules.mesh, kv_pages_spec(self.rules))
        values = Abstract(shape, self.page_dtype, sharding=pool_format(sharding))
        if not is_quantised(self.kv_dtype):
            return values
        scales = Abstract(
            (*shape[:2], 2, *shape[3:5]), SCALE_DTYPE, sharding=pool_format(sharding, ndim=5)
        )
        return KvPages(values, scales)

    @property
    def _pool_format(self) -> Any:
        """Placement and layout of the pool's arrays."""
        return jax.tree.map(lambda array: array.format, self.kv_pages)

    @property
    def last_tokens(self) -> Abstract:
        """The token sampled last in every slot: int32 [shards, slots]."""
        return self._per_shard((self.program.buckets.max_rows,), jnp.int32)

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        """Values of one page off the device: layers, parts, all KV heads, page_size, width."""
        layers, _, parts, kv_heads, page_size, width = self.kv_pages.shape
        return layers, parts, kv_heads, page_size, width

    @property
    def page_layout(self) -> PageLayout:
        """One page as the host keeps it, with the heads of all devices."""
        arrays = jax.tree.leaves(self.kv_pages)
        shapes = tuple((array.shape[0], *array.shape[2:]) for array in arrays)
        return PageLayout(shapes, tuple(np.dtype(array.dtype) for array in arrays))

    @property
    def pages_per_shard(self) -> int:
        """Pages of one data shard's part of the pool: page numbers are below it."""
        return self.num_pages // self.rules.data

    @property
    def page_bytes(self) -> int:
        """What one page takes on each of its shard's devices."""
        return page_bytes(self.program.graph.config, self.rules, self.kv_dtype, self.page_size)

    @property
    def page_pieces(self) -> tuple[int, ...]:
        """The numbers of pages, ascending from 1, that one program saves or fetches."""
        return piece_sizes(self.page_bytes)

    def pages(self, n: int) -> AbstractPool:
        """Contents of `n` pages of every shard: [shards, n, *page_shape], and their scales."""
        sharding = NamedSharding(self.rules.mesh, self._pages_spec)

        def contents(array: Abstract) -> Abstract:
            layers, _, *rest = array.shape
            shape = (self.rules.data, n, layers, *rest)
            return Abstract(shape, array.dtype, sharding=sharding)

        return jax.tree.map(contents, self.kv_pages)

    # -- the programs of a step ---------------------------------------------------------------

    def packed(self, num_tokens: int) -> Abstract:
        """The packed step of one token bucket: int32 [shards, length]."""
        buckets = self.program.buckets
        length = packed_length(num_tokens, buckets.rows(num_tokens), buckets.max_pages)
        return self._per_shard((length,), jnp.int32)

    def backbone(self, num_tokens: int) -> Lowered:
        """The whole backbone for one token bucket; it takes the pool and gives it back."""
        function = partial(self.program.backbone, num_tokens=num_tokens, dtype=self.dtype)
        out = (self._pool_format, self._split, self._split, self._split)
        _, *args = self.backbone_args(num_tokens)
        return self._lower(function, out, self.params, *args)

    def backbone_args(self, num_tokens: int) -> tuple[Any, ...]:
        """What the whole backbone takes, without weights that are the head's alone."""
        params = {name: one for name, one in self.params.items() if name != "lm_head"}
        return params, self.kv_pages, self.last_tokens, self.packed(num_tokens)

    def embed(self, num_tokens: int) -> Lowered:
        """(embedding, last tokens, packed) -> hidden states; see `StepProgram`."""
        function = partial(self.program.embed, num_tokens=num_tokens, dtype=self.dtype)
        params, packed = self.params_named(("embed",)), self.packed(num_tokens)
        return self._lower(function, self._split, params, self.last_tokens, packed, donate=None)

    def span(self, index: int, num_tokens: int) -> Lowered:
        """(weights, first layer, hidden states, pool, packed) -> hidden states, pool."""
        function = partial(self.program.run_span, span=self.program.spans[index])
        out = self._split, self._pool_format
        return self._lower(function, out, *self.span_args(index, num_tokens), donate=(2, 3))

    def span_args(self, index: int, num_tokens: int) -> tuple[Any, ...]:
        """What the program of a span takes."""
        params = self.program.spans[index].own(self.params)
        first = Abstract((), jnp.int32, sharding=self.rules.sharding())
        hidden, packed = self._token_hidden(num_tokens), self.packed(num_tokens)
        return params, first, hidden, self.kv_pages, packed

    def finish(self, num_tokens: int) -> Lowered:
        """(final norm, hidden states, packed) -> what samplers take, all tokens' states."""
        out = (self._split, self._split, self._split)
        params = self.params_named(self.program.graph.final_names)
        hidden, packed = self._token_hidden(num_tokens), self.packed(num_tokens)
        return self._lower(self.program.finish, out, params, hidden, packed)

    def _token_hidden(self, num_tokens: int) -> Abstract:
        """Hidden states of all tokens, as they pass from span to span."""
        width = self.program.graph.config.hidden_size
        return self._per_shard((num_tokens, width), self.dtype)

    def params_named(self, names: Iterable[str]) -> dict[str, Any]:
        """Some of the weights by name."""
        params = self.params
        return {name: params[name] for name in names}

    def sampler(self, num_sampled: int) -> Lowered:
        """The head and the sampler for one bucket of rows."""
        function = partial(self.program.sampler, num_sampled=num_sampled)
        out = (self._split, self._split)
        return self._lower(function, out, self._head, self.last_tokens, self.hidden, self._sampling)

    @property
    def hidden(self) -> Abstract:
        """The rows' last hidden states, as they pass from the backbone to what samples."""
        return self._per_shard(self.program.hidden_shape, self.dtype)

    @property
    def _sampling(self) -> Abstract:
        return self._per_shard(self.program.sampling_shape, jnp.int32)

    @property
    def _head(self) -> dict[str, Abstract]:
        return self.params_named(self.program.graph.head_names)

    # -- the programs of a late step, after the backbone --------------------------------------

    def late_logits(self, num_sampled: int) -> Lowered:
        """(head, hidden, whether it is normed) -> logits of the first rows; see `StepProgram`."""
        function = partial(self.program.late_logits, num_sampled=num_sampled)
        out, normed = self._logits(num_sampled).sharding, Abstract((), jnp.bool_)
        return self._lower(function, out, self._head, self.hidden, normed, donate=None)

    def edit_logits(self, num_sampled: int) -> Lowered:
        """(logits, edits) -> other logits; see `logit_programs.edit_logits`."""
        logits, edits = self._logits(num_sampled), self.edits(num_sampled)
        function = self._on_logits(edit_logits, self._logits_spec)
        return self._lower(function, logits.sharding, logits, edits, donate=None)

    def late_draw(self, num_sampled: int) -> Lowered:
        """(last tokens, logits, sampling, masks) -> last tokens, tokens; see `StepProgram`."""
        out, logits = (self._split, self._split), self._logits(num_sampled)
        masks = self.masks(num_sampled)
        return self._lower(
            self.program.late_draw, out, self.last_tokens, logits, self._sampling, masks, donate=0
        )

    def token_logprobs(self, num_sampled: int) -> Lowered:
        """(logits, tokens) -> log-probabilities; see `logit_programs.token_logprobs`."""
        tokens = self._per_shard((num_sampled,), jnp.int32)
        function = self._on_logits(token_logprobs, PartitionSpec("data"))
        return self._lower(function, self._split, self._logits(num_sampled), tokens, donate=None)

    def edits(self, num_sampled: int) -> Abstract:
        """What is told of the logits to be edited by one call: int32 [shards, EDIT_FIELDS, n]."""
        return self._per_shard((EDIT_FIELDS, max_edits(num_sampled)), jnp.int32)

    def masks(self, num_sampled: int) -> Abstract:
        """Which tokens the rows may have: uint32 [shards, num_sampled, mask_words]."""
        return self._per_shard((num_sampled, self.program.mask_words), jnp.uint32)

    def _logits(self, num_sampled: int) -> Abstract:
        vocab_size = self.program.graph.config.vocab_size
        sharding = NamedSharding(self.rules.mesh, self._logits_spec)
        return Abstract((self.rules.data, num_sampled, vocab_size), jnp.float32, sharding=sharding)

    def _on_logits(self, function: Callable, out: PartitionSpec) -> Callable:
        """A function of logits and something per shard, on every device's own part of both."""
        axis = self._logits_spec[2]
        return jax.shard_map(
            partial(function, axis=axis),
            mesh=self.rules.mesh,
            in_specs=(self._logits_spec, PartitionSpec("data")),
            out_specs=out,
            check_vma=False,
        )

    @property
    def _logits_spec(self) -> PartitionSpec:
        return self.rules.spec(("data", None, "vocab"))

    # -- the programs that move pages ---------------------------------------------------------

    def save_pages(self, n: int) -> Lowered:
        """(pool, int32 [shards, n]) -> the contents of these pages; see `pages`."""
        out = jax.tree.map(lambda array: array.sharding, self.pages(n))
        function = self._on_shards(gather_pages, self._pages_spec, PartitionSpec("data"))
        numbers = self._per_shard((n,), jnp.int32)
        return self._lower(function, out, self.kv_pages, numbers, donate=None)

    def fetch_pages(self, n: int) -> Lowered:
        """(pool, int32 [shards, n], contents) -> the pool with these pages filled."""
        ins = (PartitionSpec("data"), self._pages_spec)
        function = self._on_shards(scatter_pages, kv_pages_spec(self.rules), *ins)
        numbers = self._per_shard((n,), jnp.int32)
        out = self._pool_format
        return self._lower(function, out, self.kv_pages, numbers, self.pages(n), donate=0)

    def copy_pages(self) -> Lowered:
        """(pool, int32 [shards, 2, COPIES]) -> the pool, sources copied to targets."""
        out = self._pool_format
        function = self._on_shards(copy_pages, kv_pages_spec(self.rules), PartitionSpec("data"))
        moves = self._per_shard((2, COPIES), jnp.int32)
        return self._lower(function, out, self.kv_pages, moves, donate=0)

    def _on_shards(self, function: Callable, out: PartitionSpec, *ins: PartitionSpec) -> Callable:
        """A function of the pool and more, on every device's own part: pages never travel."""
        return jax.shard_map(
            function,
            mesh=self.rules.mesh,
            in_specs=(kv_pages_spec(self.rules), *ins),
            out_specs=out,
            check_vma=False,  # loops with run-time trip counts carry per-shard values
        )

    def _lower(
        self,
        function: Callable,
        out_shardings: Any,
        *args: Any,
        donate: int | tuple[int, ...] | None = 1,
    ) -> Lowered:
        """Lower with those arguments donated that the program changes on the device."""
        donated = () if donate is None else donate
        jitted = jax.jit(function, donate_argnums=donated, out_shardings=out_shardings)
        # Kernels ask while they are traced which device they will run on.
        with jax.sharding.use_abstract_mesh(self.rules.mesh.abstract_mesh):
            return jitted.lower(*args)

    @property
    def _pages_spec(self) -> PartitionSpec:
        return self.rules.spec(("data", None, None, None, "kv_heads"))

    @property
    def _split(self) -> NamedSharding:
        return self.rules.sharding("data")  # of anything that is one part per shard

    def _per_shard(self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Abstract:
        return Abstract((self.rules.data, *shape), dtype, sharding=self._split)
