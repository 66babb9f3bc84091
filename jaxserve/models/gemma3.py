"""Gemma 3 (text): norms before and after each part, qk-norm, local and global attention."""

import jax
from flax import nnx

from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Layer, param
from jaxserve.models.layers import Linear, gated_mlp, rms_norm


class Gemma3Layer(Layer):
    """Attention and a gated MLP, each between two norms, each on its own residual."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        self.post_attention_norm = param(rngs, (config.hidden_size,), None)
        self.post_mlp_norm = param(rngs, (config.hidden_size,), None)

    def finish(self, x: jax.Array, attended: jax.Array, linear: Linear) -> jax.Array:
        """What follows attention: both blocks are normalised before and after."""
        config, eps = self.config, self.config.norm_eps
        x = x + rms_norm(linear(attended, self.o[...]), self.post_attention_norm[...], eps)
        normed = rms_norm(x, self.mlp_norm[...], eps)
        gate_up, down = self.gate_up[...], self.down[...]
        expanded = gated_mlp(normed, gate_up, down, config.activation, linear)
        return x + rms_norm(expanded, self.post_mlp_norm[...], eps)
