"""The Llama family: Llama 2 and 3, SmolLM2, Mistral, Qwen2 (with its QKV bias)."""

import jax
from flax import nnx

from jaxserve.models.attention import AttentionBackend
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Attention, Rope, param
from jaxserve.models.layers import gated_mlp, rms_norm
from pallas_kernels.paged_batch import PagedBatch


class LlamaLayer(Attention):
    """Pre-norm attention and a gated MLP, each on its own residual."""

    def __init__(self, config: ModelConfig, index: int, rngs: nnx.Rngs) -> None:
        super().__init__(config, index, rngs)
        hidden, mlp = config.hidden_size, config.intermediate_size
        self.attention_norm = param(rngs, (hidden,), None)
        self.mlp_norm = param(rngs, (hidden,), None)
        self.gate_up = param(rngs, (2, mlp, hidden), None, "mlp", None, fan_in=hidden)
        self.down = param(rngs, (hidden, mlp), None, "mlp", fan_in=mlp)

    def __call__(
        self,
        x: jax.Array,
        kv_pages: jax.Array,
        batch: PagedBatch,
        ropes: tuple[Rope, Rope],
        backend: AttentionBackend,
    ) -> tuple[jax.Array, jax.Array]:
        """x [tokens, hidden] -> [tokens, hidden], and the pool with this layer's new KV."""
        config = self.config
        normed = rms_norm(x, self.attention_norm[...], config.norm_eps)
        attended, kv_pages = self.attend(normed, kv_pages, batch, ropes, backend)
        x = x + attended
        normed = rms_norm(x, self.mlp_norm[...], config.norm_eps)
        return x + gated_mlp(normed, self.gate_up[...], self.down[...], config.activation), kv_pages
