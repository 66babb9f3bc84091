"""What a caller may ask of the sampler and of the stopping rules."""

import dataclasses
import math

from jaxserve.core.errors import InvalidRequest

MAX_STOP_STRINGS = 16
MAX_SEED = 2**64 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping settings of one request (names and defaults as in vLLM).

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it before filtering.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1].
        min_p: drop tokens less likely than `min_p` times the most likely one, in [0, 1].
        seed: makes the request's tokens reproducible; None draws a fresh seed.
        max_tokens: tokens to generate at most; None runs to the model's context length.
        stop: strings that end the generation; they are not part of the returned text.
        stop_token_ids: tokens that end the generation, beside the model's own EOS.
        ignore_eos: generate on past the model's EOS tokens (for benchmarks).

    Raises:
        InvalidRequest: a value is outside its range; the message names the field.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for field in ("temperature", "top_p", "min_p"):
            if not math.isfinite(getattr(self, field)):
                raise InvalidRequest(f"{field} must be a finite number")
        if not 0 <= self.temperature <= 100:
            raise InvalidRequest(f"temperature must be in [0, 100], got {self.temperature}")
        if self.top_k < -1 or self.top_k >= 2**31:
            raise InvalidRequest(f"top_k must be -1, 0 or a positive int32, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise InvalidRequest(f"min_p must be in [0, 1], got {self.min_p}")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise InvalidRequest(f"seed must be in [0, 2**64), got {self.seed}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, got {self.max_tokens}")
        if len(stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"at most {MAX_STOP_STRINGS} stop strings, got {len(stop)}")
        if any(not isinstance(s, str) or not s for s in stop):
            raise InvalidRequest("stop strings must be non-empty strings")
        if any(t < 0 or t >= 2**31 for t in self.stop_token_ids):
            raise InvalidRequest("stop_token_ids must be non-negative int32 values")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0
