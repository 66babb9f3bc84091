"""The Llama family: Llama 2 and 3, SmolLM2, Mistral, Qwen2 (with its QKV bias)."""

import jax

from jaxserve.models.decoder import Layer
from jaxserve.models.layers import gated_mlp, linear, rms_norm


class LlamaLayer(Layer):
    """Pre-norm attention and a gated MLP, each on its own residual."""

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """See `Layer.finish`."""
        config = self.config
        x = x + linear(attended, self.o[...])
        normed = rms_norm(x, self.mlp_norm[...], config.norm_eps)
        return x + gated_mlp(normed, self.gate_up[...], self.down[...], config.activation)
