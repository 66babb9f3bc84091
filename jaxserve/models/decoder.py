"""What all families share: attention's projections, the loop over layers, the head."""

import abc
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxserve.models.backend import KernelBackend
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import Linear, rms_norm, rope_frequencies, rope_table, rotate
from jaxserve.models.parameters import Parameter
from jaxserve.models.weights import take_rows
from pallas_kernels.paged_batch import PagedBatch

Rope = tuple[jax.Array, jax.Array]


class Layer(nnx.Module, abc.ABC):
    """Base of a family's layer: what comes before attention, and what after.

    Its parameters are attributes, under the names that the family declares
    (`models.parameters`).
    """

    qkv: nnx.Param
    qkv_bias: nnx.Param
    q_norm: nnx.Param
    k_norm: nnx.Param
    o: nnx.Param
    attention_norm: nnx.Param
    mlp_norm: nnx.Param
    gate_up: nnx.Param
    down: nnx.Param

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def project(self, x: jax.Array, linear: Linear) -> tuple[jax.Array, jax.Array, jax.Array]:
        """From x [tokens, hidden] to what attention needs, not yet rotated.

        `linear` multiplies by weights.

        Returns:
            q [tokens, kv_heads, group, head_dim], k and v [tokens, kv_heads, head_dim].
        """
        config = self.config
        x = rms_norm(x, self.attention_norm[...], config.norm_eps)
        qkv = linear(x, self.qkv)  # [tokens, kv_heads, group + 2, head_dim]
        if config.qkv_bias:
            qkv = qkv + self.qkv_bias[...]
        q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
        if config.qk_norm:
            q = rms_norm(q, self.q_norm[...], config.norm_eps)
            k = rms_norm(k, self.k_norm[...], config.norm_eps)
        return q, k, v

    @abc.abstractmethod
    def finish(self, x: jax.Array, attended: jax.Array, linear: Linear) -> jax.Array:
        """The rest of the layer.

        Args:
            x: [tokens, hidden], the layer's input.
            attended: [tokens, heads * head_dim], attention's output.
            linear: multiplies by weights.

        Returns:
            The layer's output [tokens, hidden].
        """


class Decoder(nnx.Module):
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
            setattr(owner, own, nnx.Param(jax.ShapeDtypeStruct(parameter.shape, jnp.float32)))

    def hidden(
        self,
        token_ids: jax.Array,
        kv_pages: jax.Array,
        batch: PagedBatch,
        positions: jax.Array,
        backend: KernelBackend,
    ) -> tuple[jax.Array, jax.Array]:
        """Run the layers.

        Args:
            token_ids: int32 [tokens].
            kv_pages: the KV pool.
            batch: which tokens belong to whom.
            positions: int32 [tokens], absolute.
            backend: runs attention, and multiplies by weights.

        Returns:
            Final hidden states [tokens, hidden], not normed, and the updated pool.
        """
        config = self.config
        x = take_rows(self.embed.get_value(), token_ids).astype(self.final_norm.get_value().dtype)
        if config.embed_scale != 1.0:
            x = x * jnp.asarray(config.embed_scale, x.dtype)
        run = self._looped if backend.loop_layers else self._unrolled
        return run(x, kv_pages, batch, self._ropes(positions), backend)

    def _ropes(self, positions: jax.Array) -> tuple[Rope, Rope]:
        """Rotations of full and of sliding layers."""
        config = self.config
        theta, scaling = config.rope_theta, config.rope_scaling
        full = rope_table(positions, rope_frequencies(config.head_dim, theta, scaling))
        if config.rope_theta_local is None:
            return full, full
        local = rope_frequencies(config.head_dim, config.rope_theta_local, None)
        return full, rope_table(positions, local)

    def _unrolled(
        self,
        x: jax.Array,
        kv_pages: jax.Array,
        batch: PagedBatch,
        ropes: tuple[Rope, Rope],
        backend: KernelBackend,
    ) -> tuple[jax.Array, jax.Array]:
        """One layer after the other in the program: the compiler sees across layers."""
        linear = backend.linear_of(jnp.sum(batch.query_len))
        for index, layer in enumerate(self.layers):
            window = self.config.sliding_window[index]
            q, k, v = layer.project(x, linear)
            rope = ropes[0 if window is None else 1]
            attended, kv_pages = backend(
                rotate(q, rope), rotate(k, rope), v, kv_pages, batch,
                config=self.config, layer=index, sliding_window=window,
            )  # fmt: skip
            x = layer.finish(x, _joined(attended), linear)
        return x, kv_pages

    def _looped(
        self,
        x: jax.Array,
        kv_pages: jax.Array,
        batch: PagedBatch,
        ropes: tuple[Rope, Rope],
        backend: KernelBackend,
    ) -> tuple[jax.Array, jax.Array]:
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

        def body(index: jax.Array, state: tuple[jax.Array, jax.Array]):
            x, kv_pages = state
            projects = [partial(layer.project, linear=linear) for layer in self.layers]
            q, k, v = lax.switch(index, projects, x)
            if one_window == -1:
                window = windows[index]
                rope = jax.tree.map(partial(jnp.where, window == no_window), *ropes)
            else:
                window, rope = one_window, ropes[0 if one_window is None else 1]
            attended, kv_pages = backend(
                rotate(q, rope), rotate(k, rope), v, kv_pages, batch,
                config=self.config, layer=index, sliding_window=window,
            )  # fmt: skip
            finishes = [partial(layer.finish, linear=linear) for layer in self.layers]
            x = lax.switch(index, finishes, x, _joined(attended))
            return x, kv_pages

        return lax.fori_loop(0, len(self.layers), body, (x, kv_pages))

    def logits(self, hidden: jax.Array, linear: Linear) -> jax.Array:
        """hidden [rows, hidden], as `hidden` returns it -> float32 [rows, vocab]."""
        return self.head(self.norm(hidden), linear)

    def norm(self, hidden: jax.Array) -> jax.Array:
        """The final norm of hidden [rows, hidden]: what embeddings are made of."""
        return rms_norm(hidden, self.final_norm[...], self.config.norm_eps)

    def head(self, normed: jax.Array, linear: Linear) -> jax.Array:
        """normed [rows, hidden], as `norm` returns it -> float32 [rows, vocab]."""
        config = self.config
        head = self.embed if config.tie_embeddings else self.lm_head
        logits = linear(normed, head).astype(jnp.float32)
        if config.final_soft_cap is not None:
            logits = config.final_soft_cap * jnp.tanh(logits / config.final_soft_cap)
        return logits


def _joined(attended: jax.Array) -> jax.Array:
    """[tokens, kv_heads, group, head_dim] -> [tokens, heads * head_dim]."""
    return attended.reshape(attended.shape[0], -1)
