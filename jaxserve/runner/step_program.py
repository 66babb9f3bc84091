"""The XLA programs of a step: the backbone, and the head with the sampler.

They are compiled apart, the backbone per token bucket and the sampler per bucket of rows, so
that programs add up instead of multiplying. What passes between them has one shape for all.

The backbone is `embed`, then the layers by spans (`models.spans`), then `finish`: one program
with all of it for a single span, else each a program of its own.

In a late step the head and the sampler are two programs: `logit_programs` come between them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.backend import KernelBackend
from jaxserve.models.graph import ModelGraph, Params
from jaxserve.models.spans import Span, choose_num_spans, cut
from jaxserve.parallel.mesh import ShardingRules
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.logit_programs import allow
from jaxserve.runner.packing import (
    NO_SLOT,
    SAMPLING_FIELDS,
    UnpackedStep,
    unpack,
    unpack_sampling,
)
from jaxserve.runner.sampler import sample
from pallas_kernels.kv_pages import KvPool
from pallas_kernels.linear import Activations
from pallas_kernels.paged_batch import PagedBatch


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """Pure functions of (weights, device state, packed step); jitted by the runner.

    Attributes:
        graph: the model's structure without its weights.
        backend: runs attention.
        buckets: shapes per data shard.
        num_spans: into how many spans the layers are cut.

    Raises:
        ValueError: there are fewer layers than spans.
    """

    graph: ModelGraph
    backend: KernelBackend
    buckets: Buckets
    num_spans: int = 1

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        """The layers' spans, in order."""
        return cut(self.graph, self.num_spans)

    @classmethod
    def of_graph(
        cls,
        graph: ModelGraph,
        rules: ShardingRules,
        buckets: Buckets,
        implementation: str,
        linear_implementation: str = "xla",
        activations: Activations = "float",
        num_spans: int | None = None,
        weight_bytes: int = 0,
    ) -> "StepProgram":
        """The step of a model on a mesh.

        Args:
            graph: the model as it runs.
            rules: the mesh, and what is split over it.
            buckets: shapes per data shard.
            implementation: of attention.
            linear_implementation: of the products with weights.
            activations: what quantised weights multiply, see `pallas_kernels.linear`.
            num_spans: into how many spans the layers are cut; None: one where they are a loop
                in the program, elsewhere as `models.spans.choose_num_spans` says.
            weight_bytes: of all weights, on each device; for that choice.
        """
        # XLA:CPU compiles unrolled layers slowly; the others gain from seeing across layers. The
        # GPU kernel, which a CPU may interpret, takes no traced window.
        loop = rules.mesh.devices.flat[0].platform == "cpu" and implementation != "gpu"
        backend = KernelBackend(rules, implementation, loop, linear_implementation, activations)
        if num_spans is None:
            num_spans = 1 if loop else choose_num_spans(graph.config, weight_bytes)
        return cls(graph, backend, buckets, num_spans)

    def backbone(
        self,
        params: Params,
        kv_pages: KvPool,
        last_tokens: jax.Array,
        packed: jax.Array,
        *,
        num_tokens: int,
        dtype: np.dtype,
    ) -> tuple[KvPool, jax.Array, jax.Array, jax.Array]:
        """Run all layers over one step's tokens.

        Args:
            params: weights by name.
            kv_pages: the KV pool (donated).
            last_tokens: int32 [shards, slots], the token sampled last in every slot.
            packed: int32 [shards, length]; see `packing`.
            num_tokens: the token bucket, per shard.
            dtype: of hidden states.

        Returns:
            The pool, and what `finish` returns.
        """
        hidden = self.embed(params, last_tokens, packed, num_tokens=num_tokens, dtype=dtype)
        hidden, kv_pages = self._run_layers(self.graph, params, 0, hidden, kv_pages, packed)
        return kv_pages, *self.finish(params, hidden, packed)

    def embed(
        self,
        params: Params,
        last_tokens: jax.Array,
        packed: jax.Array,
        *,
        num_tokens: int,
        dtype: np.dtype,
    ) -> jax.Array:
        """What goes into the first layer.

        Args:
            params: the embedding's weights, by name.
            last_tokens, packed, num_tokens, dtype: as of `backbone`.

        Returns:
            [shards, num_tokens, hidden].
        """
        step = self._unpack(packed, num_tokens)
        slots = jnp.take_along_axis(last_tokens, -1 - jnp.minimum(step.token_ids, -1), axis=1)
        token_ids = jnp.where(step.token_ids >= 0, step.token_ids, slots)
        hidden = self.graph.model(params).embedded(token_ids.reshape(-1), dtype)
        return hidden.reshape(*token_ids.shape, -1)

    def run_span(
        self,
        params: Params,
        first_layer: jax.Array,
        hidden: jax.Array,
        kv_pages: KvPool,
        packed: jax.Array,
        *,
        span: Span,
    ) -> tuple[jax.Array, KvPool]:
        """Run the layers of a span, or of any that is like it.

        Args:
            params: their weights, by their names in `span.graph`.
            first_layer: int32 [], where they begin on the pool's first axis.
            hidden: [shards, tokens, hidden], what goes into them (donated).
            kv_pages: the KV pool (donated).
            packed: as of `backbone`.
            span: what they are like.

        Returns:
            What comes out of them, and the pool.
        """
        return self._run_layers(span.graph, params, first_layer, hidden, kv_pages, packed)

    def _run_layers(
        self,
        graph: ModelGraph,
        params: Params,
        first_layer: int | jax.Array,
        hidden: jax.Array,
        kv_pages: KvPool,
        packed: jax.Array,
    ) -> tuple[jax.Array, KvPool]:
        shards, num_tokens, width = hidden.shape
        rows = self._unpack(packed, num_tokens).batch
        positions = jax.vmap(lambda *rows: PagedBatch(*rows).positions(num_tokens)[0])(*rows)
        flat = PagedBatch(*(field.reshape(-1, *field.shape[2:]) for field in rows))
        hidden, kv_pages = graph.model(params).run_layers(
            hidden.reshape(-1, width), kv_pages, flat, positions.reshape(-1), self.backend,
            first_layer=first_layer,
        )  # fmt: skip
        return hidden.reshape(shards, num_tokens, width), kv_pages

    def finish(
        self, params: Params, hidden: jax.Array, packed: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Make of the last layer's output what is sampled from, and what embeddings are made of.

        Args:
            params: the final norm's weights, by name.
            hidden: [shards, num_tokens, hidden] (donated).
            packed: as of `backbone`.

        Returns:
            The last hidden state of every row, [shards, max_rows, hidden]; how to sample them,
            int32 [shards, SAMPLING_FIELDS, max_rows]; and the hidden states of all tokens, after
            the final norm, [shards, num_tokens, hidden].
        """
        num_tokens = hidden.shape[1]
        num_rows = self.buckets.rows(num_tokens)
        step = self._unpack(packed, num_tokens)
        last = step.batch.query_start + jnp.maximum(step.batch.query_len - 1, 0)
        rows = jnp.take_along_axis(hidden, last[..., None], axis=1)
        missing = self.buckets.max_rows - num_rows
        rows = jnp.pad(rows, ((0, 0), (0, missing), (0, 0)))
        sampling = jnp.pad(step.sampling, ((0, 0), (0, 0), (0, missing)))
        sampling = sampling.at[:, 0, num_rows:].set(NO_SLOT)
        return rows, sampling, self.graph.model(params).norm(hidden)

    def _unpack(self, packed: jax.Array, num_tokens: int) -> UnpackedStep:
        return unpack(packed, num_tokens, self.buckets.rows(num_tokens), self.buckets.max_pages)

    def sampler(
        self,
        params: Params,
        last_tokens: jax.Array,
        hidden: jax.Array,
        sampling: jax.Array,
        *,
        num_sampled: int,
    ) -> tuple[jax.Array, jax.Array]:
        """Sample the first `num_sampled` rows of every shard.

        Args:
            params: the weights of the head, by name.
            last_tokens: int32 [shards, slots] (donated).
            hidden, sampling: as the backbone returns them.
            num_sampled: the row bucket, per shard.

        Returns:
            `last_tokens` with the new tokens in their slots; and the tokens, int32 [shards,
            num_sampled].
        """
        model = self.graph.model(params)
        slots = sampling[0, 0, :num_sampled]
        count = jnp.max(jnp.where(slots != NO_SLOT, jnp.arange(1, num_sampled + 1), 0))
        linear = self.backend.linear_of(count)
        logits = model.logits(_first_rows(hidden, num_sampled), linear)
        return _draw(last_tokens, logits, sampling, num_sampled)

    def late_logits(
        self, params: Params, hidden: jax.Array, normed: jax.Array, *, num_sampled: int
    ) -> jax.Array:
        """The head alone, for the first `num_sampled` rows of every shard.

        Args:
            params: the weights of the head, by name.
            hidden: as the backbone returns it, of rows or, normed, of tokens.
            normed: bool [], whether the final norm was applied to it.

        Returns:
            float32 [shards, num_sampled, vocab].
        """
        model = self.graph.model(params)
        rows = _first_rows(hidden, num_sampled)
        normed_rows = jnp.where(normed, rows, model.norm(rows))
        logits = model.head(normed_rows, self.backend.linear)
        return logits.reshape(hidden.shape[0], num_sampled, -1)

    def late_draw(
        self, last_tokens: jax.Array, logits: jax.Array, sampling: jax.Array, masks: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Sample from logits.

        Args:
            last_tokens: int32 [shards, slots] (donated).
            logits: float32 [shards, num_sampled, vocab].
            sampling: as the backbone returns it.
            masks: uint32 [shards, num_sampled, mask_words], the tokens allowed.

        Returns:
            As `sampler`.
        """
        shards, num_sampled, vocab = logits.shape
        flat = logits.reshape(shards * num_sampled, vocab)
        flat = allow(flat, masks.reshape(shards * num_sampled, -1))
        return _draw(last_tokens, flat, sampling, num_sampled)

    @property
    def mask_words(self) -> int:
        """Words of 32 bits that hold a bit for every token."""
        return -(-self.graph.config.vocab_size // 32)

    @property
    def hidden_shape(self) -> tuple[int, int]:
        """Rows and width, per shard, of what passes from backbone to sampler."""
        return self.buckets.max_rows, self.graph.config.hidden_size

    @property
    def sampling_shape(self) -> tuple[int, int]:
        """Shape per shard of the sampling settings that pass from backbone to sampler."""
        return SAMPLING_FIELDS, self.buckets.max_rows


def _first_rows(hidden: jax.Array, count: int) -> jax.Array:
    """[shards, rows, hidden] -> [shards * count, hidden]."""
    return hidden[:, :count].reshape(hidden.shape[0] * count, -1)


def _draw(
    last_tokens: jax.Array, logits: jax.Array, sampling: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Sample from logits [shards * count, vocab], and keep the tokens in their slots."""
    rows = unpack_sampling(sampling[:, :, :count])
    flat = type(rows)(*(field.reshape(-1) for field in rows))
    tokens = sample(logits, flat).reshape(rows.slot.shape)
    shard = jnp.arange(len(tokens))[:, None]
    return last_tokens.at[shard, rows.slot].set(tokens, mode="drop"), tokens
