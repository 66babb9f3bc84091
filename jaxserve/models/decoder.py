"""What all families share: attention's projections, the loop over layers, the head."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxserve.models.backend import KernelBackend
from jaxserve.models.config import ModelConfig, RopeKind
from jaxserve.models.layers import (
    Linear,
    activate,
    layer_norm,
    rms_norm,
    rope_frequencies,
    rope_table,
    rotate,
)
from jaxserve.models.parameters import Parameter
from jaxserve.models.weights import take_rows
from pallas_kernels.kv_pages import KvPool
from pallas_kernels.paged_batch import PagedBatch

Rope = tuple[jax.Array, jax.Array] | None  # None: no rotation


class Normed(nnx.Module):
    """A module that norms by its own factors."""

    config: ModelConfig

    def norm_by(self, name: str, x: jax.Array) -> jax.Array:
        """x [..., hidden], normed by the factors of that name; as it is if none are declared."""
        scale, bias = getattr(self, name, None), getattr(self, f"{name}_bias", None)
        if scale is None:
            return x
        if self.config.layer_norm:
            return layer_norm(
                x, scale[...], None if bias is None else bias[...], self.config.norm_eps
            )
        return rms_norm(x, scale[...], self.config.norm_eps)


class Layer(Normed):
    """A layer: attention and then a gated MLP, each on its own residual.

    Its parameters are attributes, under the names that the family declares (`models.parameters`):
    `qkv`, `o`, `gate_up`, `down`, the biases of each (`qkv_bias`), norms of what goes into each
    block (`attention_norm`, `mlp_norm`) and of what comes out of it (`post_attention_norm`,
    `post_mlp_norm`). A bias or a norm that is not declared is not there. A family whose layers do
    something else overrides what it is.
    """

    q_norm: nnx.Param
    k_norm: nnx.Param

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def product(self, x: jax.Array, name: str, linear: Linear) -> jax.Array:
        """x [tokens, in] times the weight of that name, plus its bias if it has one."""
        out, bias = linear(x, getattr(self, name)), getattr(self, f"{name}_bias", None)
        return out if bias is None else out + bias[...]

    def project(self, x: jax.Array, linear: Linear) -> tuple[jax.Array, jax.Array, jax.Array]:
        """From x [tokens, hidden] to what attention needs, not yet rotated.

        `linear` multiplies by weights.

        Returns:
            q [tokens, kv_heads, group, head_dim], k and v [tokens, kv_heads, head_dim].
        """
        qkv = self.product(self.norm_by("attention_norm", x), "qkv", linear)
        # [tokens, kv_heads, group + 2, head_dim]
        q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
        return *self.norm_heads(q, k), v

    def norm_heads(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries and keys as `project` returns them, normed if the model norms them."""
        if not self.config.qk_norm:
            return q, k
        eps = self.config.norm_eps
        return rms_norm(q, self.q_norm[...], eps), rms_norm(k, self.k_norm[...], eps)

    def mlp(self, x: jax.Array, linear: Linear) -> jax.Array:
        """The gated MLP of x [tokens, hidden], which is normed already."""
        both = self.product(x, "gate_up", linear)  # [tokens, 2, F]
        gate, up = both[:, 0], both[:, 1]
        return self.product(activate(gate, self.config.activation) * up, "down", linear)

    def add(self, x: jax.Array, block: jax.Array) -> jax.Array:
        """The residual x with what a block adds to it."""
        scale = self.config.residual_scale
        return x + (block if scale == 1.0 else block * jnp.asarray(scale, block.dtype))

    def finish(self, x: jax.Array, attended: jax.Array, linear: Linear) -> jax.Array:
        """The rest of the layer.

        Args:
            x: [tokens, hidden], the layer's input.
            attended: [tokens, heads * head_dim], attention's output.
            linear: multiplies by weights.

        Returns:
            The layer's output [tokens, hidden].
        """
        attended = self.product(attended, "o", linear)
        x = self.add(x, self.norm_by("post_attention_norm", attended))
        expanded = self.mlp(self.norm_by("mlp_norm", x), linear)
        return self.add(x, self.norm_by("post_mlp_norm", expanded))


class Decoder(Normed):
    """A decoder-only transformer made of one family's layers.

    It comes with the shapes of its parameters in place of their values, see `models.graph`.

    Args:
        config: the architecture.
        layer_class: the family's layer.
        parameters: the family's declaration of all parameters.
    """

    embed: nnx.Param
    final_norm: nnx.Param
    lm_head: nnx.Param

    def __init__(
        self,
        config: ModelConfig,
        layer_class: type[Layer],
        parameters: Mapping[str, Parameter],
    ) -> None:
        self.config = config
        self.layers = nnx.List([layer_class(config) for _ in range(config.num_layers)])
        for name, parameter in parameters.items():
            place, _, own = name.rpartition(".")
            owner = self.layers[int(place.removeprefix("layers."))] if place else self
            shape = jax.ShapeDtypeStruct(parameter.shape, jnp.float32)
            setattr(owner, own, nnx.Param(shape, axes=parameter.axes))

    def embedded(self, token_ids: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """What the first layer is given for token_ids, int32 [tokens]: `dtype` [tokens, hidden]."""
        x = take_rows(self.embed.get_value(), token_ids).astype(dtype)
        scale = self.config.embed_scale
        return x if scale == 1.0 else x * jnp.asarray(scale, dtype)

    def run_layers(
        self,
        x: jax.Array,
        kv_pages: KvPool,
        batch: PagedBatch,
        positions: jax.Array,
        backend: KernelBackend,
        *,
        first_layer: int | jax.Array = 0,
    ) -> tuple[jax.Array, KvPool]:
        """Run the layers over hidden states.

        Args:
            x: [tokens, hidden], what goes into the first layer.
            kv_pages: the KV pool.
            batch: which tokens belong to whom.
            positions: int32 [tokens], absolute.
            backend: runs attention, and multiplies by weights.
            first_layer: where the layers begin on the pool's first axis.

        Returns:
            Hidden states [tokens, hidden], not normed, and the updated pool.
        """
        run = self._looped if backend.loop_layers else self._unrolled
        return run(x, kv_pages, batch, self._ropes(positions), backend, first_layer)

    def _ropes(self, positions: jax.Array) -> dict[RopeKind, Rope]:
        """The rotation of each kind of layer that the model has."""
        config = self.config

        def rope(kind: RopeKind) -> Rope:
            if kind == "none":
                return None
            if kind == "local":
                assert config.rope_theta_local is not None
                local = rope_frequencies(config.rotated, config.rope_theta_local, None)
                return rope_table(positions, local)
            scaling = config.rope_scaling
            frequencies = rope_frequencies(config.rotated, config.rope_theta, scaling)
            return rope_table(positions, frequencies, scaling.attention_factor if scaling else 1.0)

        return {kind: rope(kind) for kind in get_args(RopeKind) if kind in config.rope_kinds}

    def _unrolled(
        self,
        x: jax.Array,
        kv_pages: KvPool,
        batch: PagedBatch,
        ropes: Mapping[RopeKind, Rope],
        backend: KernelBackend,
        first_layer: int | jax.Array,
    ) -> tuple[jax.Array, KvPool]:
        """One layer after the other in the program: the compiler sees across layers."""
        linear = backend.linear_of(jnp.sum(batch.query_len))
        for index, layer in enumerate(self.layers):
            window = self.config.sliding_window[index]
            q, k, v = layer.project(x, linear)
            rope = ropes[self.config.rope_kinds[index]]
            attended, kv_pages = backend(
                rotate(q, rope), rotate(k, rope), v, kv_pages, batch,
                config=self.config, layer=first_layer + index, sliding_window=window,
            )  # fmt: skip
            x = layer.finish(x, _joined(attended), linear)
        return x, kv_pages

    def _looped(
        self,
        x: jax.Array,
        kv_pages: KvPool,
        batch: PagedBatch,
        ropes: Mapping[RopeKind, Rope],
        backend: KernelBackend,
        first_layer: int | jax.Array,
    ) -> tuple[jax.Array, KvPool]:
        """A loop over layers that shares one attention and switches between their weights.

        XLA:CPU compiles every kernel of every layer anew, and attention has most of them, so
        this compiles several times faster than `_unrolled`. A scan over stacked weights would
        too, but it copies each layer's weights before every use.
        """
        linear = backend.linear_of(jnp.sum(batch.query_len))
        no_window = jnp.iinfo(jnp.int32).max
        windows = jnp.asarray([w or no_window for w in self.config.sliding_window], jnp.int32)
        one_window = (
            self.config.sliding_window[0] if len(set(self.config.sliding_window)) == 1 else -1
        )
        rope_of = _chooser(self.config.rope_kinds, ropes)

        def body(index: jax.Array, state: tuple[jax.Array, KvPool]):
            x, kv_pages = state
            projects = [partial(layer.project, linear=linear) for layer in self.layers]
            q, k, v = lax.switch(index, projects, x)
            window = windows[index] if one_window == -1 else one_window
            rope = rope_of(index)
            attended, kv_pages = backend(
                rotate(q, rope), rotate(k, rope), v, kv_pages, batch,
                config=self.config, layer=first_layer + index, sliding_window=window,
            )  # fmt: skip
            finishes = [partial(layer.finish, linear=linear) for layer in self.layers]
            x = lax.switch(index, finishes, x, _joined(attended))
            return x, kv_pages

        return lax.fori_loop(0, len(self.layers), body, (x, kv_pages))

    def logits(self, hidden: jax.Array, linear: Linear) -> jax.Array:
        """hidden [rows, hidden], as `run_layers` returns it -> float32 [rows, vocab]."""
        return self.head(self.norm(hidden), linear)

    def norm(self, hidden: jax.Array) -> jax.Array:
        """The final norm of hidden [rows, hidden]: what embeddings are made of."""
        return self.norm_by("final_norm", hidden)

    def head(self, normed: jax.Array, linear: Linear) -> jax.Array:
        """normed [rows, hidden], as `norm` returns it -> float32 [rows, vocab]."""
        config = self.config
        head = self.embed if config.tie_embeddings else self.lm_head
        logits = linear(normed, head).astype(jnp.float32)
        if config.logit_scale != 1.0:
            logits = logits * config.logit_scale
        if config.final_soft_cap is not None:
            logits = config.final_soft_cap * jnp.tanh(logits / config.final_soft_cap)
        return logits


def _chooser(
    kinds: Sequence[RopeKind], ropes: Mapping[RopeKind, Rope]
) -> Callable[[jax.Array], Rope]:
    """Takes a layer's number, known only as the program runs, and returns its rotation."""
    tables = [*ropes.values()]
    if len(tables) == 1:
        return lambda index: tables[0]
    shapes = next(table for table in tables if table is not None)
    still = jnp.ones_like(shapes[0]), jnp.zeros_like(shapes[1])
    tables = [still if table is None else table for table in tables]
    which = jnp.asarray([[*ropes].index(kind) for kind in kinds], jnp.int32)
    return lambda index: jax.tree.map(partial(lax.select_n, which[index]), *tables)


def _joined(attended: jax.Array) -> jax.Array:
    """[tokens, kv_heads, group, head_dim] -> [tokens, heads * head_dim]."""
    return attended.reshape(attended.shape[0], -1)
