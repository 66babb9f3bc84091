"""The shape of a model: everything that its program depends on, and nothing of its weights."""

import dataclasses
from typing import Literal

from jaxserve.core.errors import ConfigError

Activation = Literal["silu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary frequency scaling for contexts longer than the model was first trained on.

    `llama3` (Llama 3.1) divides low frequencies by `factor`, keeps high ones and blends
    between; `linear` divides all of them (Gemma 3's global layers).
    """

    kind: Literal["llama3", "linear"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a decoder-only transformer, one dataclass for every family.

    Sizes are in elements. `sliding_window[i]` is layer i's attention window in tokens (the
    token itself included), None for full attention; sliding layers rotate by
    `rope_theta_local` unscaled, full ones by `rope_theta` with `rope_scaling`.

    Raises:
        ConfigError: sizes do not fit together.
    """

    family: Literal["llama", "gemma3"]
    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    norm_eps: float
    rope_theta: float
    rope_theta_local: float | None = None
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    activation: Activation = "silu"
    embed_scale: float = 1.0
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    sliding_window: tuple[int | None, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly"
            )
        if not self.sliding_window:
            object.__setattr__(self, "sliding_window", (None,) * self.num_layers)
        if len(self.sliding_window) != self.num_layers:
            raise ConfigError(
                f"{len(self.sliding_window)} sliding windows for {self.num_layers} layers"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
