"""The Llama family: Llama 2 and 3, SmolLM2, Mistral, Qwen2 (with its QKV bias)."""

import jax

from jaxserve.models.decoder import Layer
from jaxserve.models.layers import Linear, gated_mlp, rms_norm


class LlamaLayer(Layer):
    """Pre-norm attention and a gated MLP, each on its own residual."""

    def finish(self, x: jax.Array, attended: jax.Array, linear: Linear) -> jax.Array:
        """What follows attention: its output projection, then the MLP."""
        config = self.config
        x = x + linear(attended, self.o[...])
        normed = rms_norm(x, self.mlp_norm[...], config.norm_eps)
        gate_up, down = self.gate_up[...], self.down[...]
        return x + gated_mlp(normed, gate_up, down, config.activation, linear)
