"""What all families share: parameters, attention projections, the loop over layers, the head."""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.attention import AttentionBackend
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import linear, rms_norm, rope_frequencies, rope_table, rotate
from pallas_kernels.paged_batch import PagedBatch

Rope = tuple[jax.Array, jax.Array]


def param(rngs: nnx.Rngs, shape: tuple[int, ...], *axes: str | None, fan_in: int = 0) -> nnx.Param:
    """A float32 weight with logical axis names: normal with 1/fan_in variance, or ones (0).

    `axes` is one name per dimension; `parallel.ShardingRules` turns it into a placement.
    """
    if fan_in == 0:
        return nnx.Param(jnp.ones(shape, jnp.float32), axes=axes)
    value = jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(fan_in)
    return nnx.Param(value, axes=axes)


class Attention(nnx.Module):
    """Base of a family's layer: the attention parameters and their use.

    The projections of one KV head lie together (its query heads, then K, then V), so that
    splitting the KV heads over devices splits everything that belongs to them.
    """

    def __init__(self, config: ModelConfig, index: int, rngs: nnx.Rngs) -> None:
        hidden, kv_heads = config.hidden_size, config.num_kv_heads
        group, dim = config.group_size, config.head_dim
        self.config, self.index = config, index
        self.qkv = param(
            rngs, (kv_heads, group + 2, dim, hidden), "kv_heads", None, None, None, fan_in=hidden
        )
        self.o = param(
            rngs, (hidden, kv_heads, group, dim), None, "kv_heads", None, None,
            fan_in=config.num_heads * dim,
        )  # fmt: skip
        if config.qkv_bias:
            shape = (kv_heads, group + 2, dim)
            self.qkv_bias = param(rngs, shape, "kv_heads", None, None, fan_in=dim)
        if config.qk_norm:
            self.q_norm = param(rngs, (dim,), None)
            self.k_norm = param(rngs, (dim,), None)

    def attend(
        self,
        x: jax.Array,
        kv_pages: jax.Array,
        batch: PagedBatch,
        ropes: tuple[Rope, Rope],
        backend: AttentionBackend,
    ) -> tuple[jax.Array, jax.Array]:
        """x [tokens, hidden] -> its attention output [tokens, hidden], and the updated pool."""
        config = self.config
        window = config.sliding_window[self.index]
        rope = ropes[0] if window is None else ropes[1]
        qkv = linear(x, self.qkv[...])  # [tokens, kv_heads, group + 2, head_dim]
        if config.qkv_bias:
            qkv = qkv + self.qkv_bias[...]
        q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
        if config.qk_norm:
            q = rms_norm(q, self.q_norm[...], config.norm_eps)
            k = rms_norm(k, self.k_norm[...], config.norm_eps)
        out, kv_pages = backend(
            rotate(q, rope),
            rotate(k, rope),
            v,
            kv_pages,
            batch,
            layer=self.index,
            scale=config.scale,
            sliding_window=window,
            soft_cap=config.attention_soft_cap,
        )
        return linear(out, self.o[...]), kv_pages


class Decoder(nnx.Module):
    """A decoder-only transformer made of one family's layers.

    Args:
        config: the architecture.
        layer_class: the family's layer, called `(config, index, rngs)`, whose call takes and
            returns what `Attention.attend` does.
        rngs: for random weights.
    """

    def __init__(self, config: ModelConfig, layer_class: type, rngs: nnx.Rngs) -> None:
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embed = param(rngs, shape, "vocab", None, fan_in=config.hidden_size)
        self.layers = nnx.List([layer_class(config, i, rngs) for i in range(config.num_layers)])
        self.final_norm = param(rngs, (config.hidden_size,), None)
        if not config.tie_embeddings:
            self.lm_head = param(rngs, shape, "vocab", None, fan_in=config.hidden_size)

    def hidden(
        self,
        token_ids: jax.Array,
        kv_pages: jax.Array,
        batch: PagedBatch,
        positions: jax.Array,
        backend: AttentionBackend,
    ) -> tuple[jax.Array, jax.Array]:
        """Run the layers.

        Args:
            token_ids: int32 [tokens].
            kv_pages: the KV pool.
            batch: which tokens belong to whom.
            positions: int32 [tokens], absolute.
            backend: runs attention.

        Returns:
            Final hidden states [tokens, hidden], not normed, and the updated pool.
        """
        config = self.config
        x = jnp.take(self.embed[...], token_ids, axis=0, mode="clip")
        if config.embed_scale != 1.0:
            x = x * jnp.asarray(config.embed_scale, x.dtype)
        local_theta = config.rope_theta_local or config.rope_theta
        local_scaling = None if config.rope_theta_local else config.rope_scaling
        ropes = (
            rope_table(
                positions, rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
            ),
            rope_table(positions, rope_frequencies(config.head_dim, local_theta, local_scaling)),
        )
        for layer in self.layers:
            x, kv_pages = layer(x, kv_pages, batch, ropes, backend)
        return x, kv_pages

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [rows, hidden] -> float32 [rows, vocab]."""
        config = self.config
        x = rms_norm(hidden, self.final_norm[...], config.norm_eps)
        head = self.embed[...] if config.tie_embeddings else self.lm_head[...]
        logits = linear(x, head).astype(jnp.float32)
        if config.final_soft_cap is not None:
            logits = config.final_soft_cap * jnp.tanh(logits / config.final_soft_cap)
        return logits


def named_params(model: nnx.Module) -> Iterator[tuple[str, nnx.Param]]:
    """Every parameter with its dotted name, as checkpoints know it."""
    for path, variable in nnx.state(model, nnx.Param).flat_state():
        yield ".".join(map(str, path)), variable
