"""The shape of a model: everything that its program depends on, and nothing of its weights."""

import dataclasses
import math
from typing import Any, Literal

from jaxserve.core.errors import ConfigError

Activation = Literal["silu", "gelu_tanh"]
# As `rope_theta` and `rope_scaling` say; by `rope_theta_local`; not at all.
RopeKind = Literal["full", "local", "none"]
MAX_LAYERS = 1024  # more can only be a mistake, and would take long to find out


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary frequency scaling for contexts longer than the model was first trained on.

    `llama3` (Llama 3.1) divides low frequencies by `factor`, keeps high ones and blends
    between; `linear` divides all of them (Gemma 3's global layers); `yarn` divides those that turn
    fewer than `beta_slow` times within `original_max_len` tokens, keeps those that turn more than
    `beta_fast` times, and blends between; `divisors` divides each by one of its own [rotated
    dimensions / 2], the largest of which is `factor`, or by `short_divisors`, where there are any,
    if no context grows beyond `original_max_len` (`ModelConfig.for_context`). Cosines and sines
    are multiplied by `attention_factor`.

    Raises:
        ConfigError: a value is out of range.
    """

    kind: Literal["llama3", "linear", "yarn", "divisors"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192
    divisors: tuple[float, ...] = ()
    short_divisors: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    whole_betas: bool = True  # the blend begins and ends at whole numbers of frequencies
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_len", "beta_fast",
            "beta_slow", "attention_factor",
        ):  # fmt: skip
            _check_number(f"rope_scaling.{name}", getattr(self, name))
        for divisor in self.divisors + self.short_divisors:
            _check_number("rope_scaling.divisors", divisor)
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"rope_scaling: low_freq_factor {self.low_freq_factor} must be below "
                f"high_freq_factor {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a decoder-only transformer, one dataclass for every family.

    Sizes are in elements. `sliding_window[i]` is layer i's attention window in tokens (the
    token itself included), None for full attention. Layers rotate by `rope_theta` with
    `rope_scaling`; sliding ones by `rope_theta_local`, unscaled, where there is one; those numbered
    in `no_rope_layers` not at all. Of each head the first `rotary_dim` dimensions rotate.

    Raises:
        ConfigError: sizes do not fit together.
    """

    family: str
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
    rotary_dim: int | None = None  # None: head_dim
    no_rope_layers: tuple[int, ...] = ()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # of every head by itself
    layer_norm: bool = False  # with the mean taken off, in place of RMS norms
    activation: Activation = "silu"
    embed_scale: float = 1.0
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_soft_cap: float | None = None
    residual_scale: float = 1.0  # of what a block adds to the residual
    logit_scale: float = 1.0
    final_soft_cap: float | None = None
    sliding_window: tuple[int | None, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    # Sizes to which embeddings may be cut: those it was trained for, () for any, None for none.
    matryoshka_dimensions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
            "num_kv_heads", "head_dim", "max_model_len",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 < value < 2**31:
                raise ConfigError(f"{name} must be a positive int32, got {value!r}")
        if self.num_layers > MAX_LAYERS:
            raise ConfigError(f"{self.num_layers} layers are more than the {MAX_LAYERS} allowed")
        for name in (
            "rope_theta", "rope_theta_local", "rotary_dim", "embed_scale", "attention_scale",
            "attention_soft_cap", "residual_scale", "logit_scale", "final_soft_cap",
        ):  # fmt: skip
            _check_number(name, getattr(self, name))
        if self.norm_eps != 0:
            _check_number("norm_eps", self.norm_eps)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly"
            )
        if not self.sliding_window:
            object.__setattr__(self, "sliding_window", (None,) * self.num_layers)
        for window in self.sliding_window:
            _check_number("sliding_window", window)
        if len(self.sliding_window) != self.num_layers:
            raise ConfigError(
                f"{len(self.sliding_window)} sliding windows for {self.num_layers} layers"
            )
        scaling, rotated = self.rope_scaling, self.rotated
        if scaling and scaling.kind == "divisors" and 2 * len(scaling.divisors) != rotated:
            raise ConfigError(f"{len(scaling.divisors)} rope frequencies for {rotated} dimensions")
        if rotated % 2 or rotated > self.head_dim:
            raise ConfigError(
                f"rotary embeddings take an even number of a head's {self.head_dim} dimensions, "
                f"not {rotated}"
            )
        if not set(self.no_rope_layers) <= set(range(self.num_layers)):
            raise ConfigError(f"no_rope_layers {self.no_rope_layers} of {self.num_layers} layers")

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def rotated(self) -> int:
        """How many dimensions of each head rotate."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def rope_kinds(self) -> tuple[RopeKind, ...]:
        """How each layer rotates its queries and keys."""
        sliding: RopeKind = "full" if self.rope_theta_local is None else "local"
        return tuple(
            "none" if n in self.no_rope_layers else "full" if window is None else sliding
            for n, window in enumerate(self.sliding_window)
        )

    def layers(self, first: int, last: int) -> "ModelConfig":
        """The model cut down to its layers from `first` up to, but without, `last`."""
        return dataclasses.replace(
            self,
            num_layers=last - first,
            sliding_window=self.sliding_window[first:last],
            no_rope_layers=tuple(n - first for n in self.no_rope_layers if first <= n < last),
        )

    def for_context(self, tokens: int) -> "ModelConfig":
        """The model as it computes if no context is longer than so many tokens.

        Keys in the cache cannot be rotated anew, so this is decided before the first of them.
        """
        scaling = self.rope_scaling
        if scaling is None or not scaling.short_divisors or tokens > scaling.original_max_len:
            return self
        short = dataclasses.replace(scaling, divisors=scaling.short_divisors)
        return dataclasses.replace(self, rope_scaling=short)

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale


def _check_number(name: str, value: Any) -> None:
    """Raise ConfigError unless the value is None or a positive, finite number."""
    if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ConfigError(f"{name} must be a positive number, got {value!r}")
