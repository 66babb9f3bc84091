"""What the engine says to its callers: token deltas, the model's facts, the current load."""

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxserve.cache.page_map import PageMap
from jaxserve.cache.store_stats import TierStats
from jaxserve.core.errors import JaxserveError
from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.request import FinishReason
from jaxserve.core.sampling_defaults import SamplingDefaults


class ActiveRequest(NamedTuple):
    """A request under way.

    Attributes:
        request_id: its id.
        tenant: on whose account it is served.
        seconds: since it came.
    """

    request_id: str
    tenant: str
    seconds: float


class Embedding(NamedTuple):
    """A text as one vector.

    Attributes:
        values: float32 [hidden], of length 1 (Euclidean).
        num_prompt_tokens: tokens of the text.
    """

    values: np.ndarray
    num_prompt_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class TokenDelta:
    """What one step added to one request.

    Attributes:
        request_id: the request it belongs to.
        text: new text that is certain; may be empty while a character, or a possible stop
            string, is incomplete.
        token_ids: the new tokens, a final stop token included.
        finish_reason: set on the request's last delta only.
        num_prompt_tokens, num_output_tokens: tokens so far, over all deltas.
        num_cached_tokens: prompt tokens whose KV was found in the cache.
        logprobs: one per token of `token_ids`, if the request asked for them, else empty.
        prompt_logprobs: one per token of the prompt from the second on, on the request's first
            delta, if it asked for them.
        stop_reason: the stop string, or the token, that ended the answer; None if that was EOS,
            or if it ended otherwise.
        error: why it ended, if the reason is ERROR.
        embedding: on the last delta of a request for one.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    stop_reason: int | str | None = None
    error: JaxserveError | None = None
    embedding: Embedding | None = None


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """Facts about the served model and how it is run; they do not change after start.

    `default_sampling_params` are for requests that do not say how to sample.
    """

    name: str
    family: str
    max_model_len: int
    vocab_size: int
    num_layers: int
    dtype: str
    kv_cache_dtype: str
    mesh: str
    attention_implementation: str
    linear_implementation: str
    page_size: int
    num_pages: int
    max_num_seqs: int
    max_num_batched_tokens: int
    platform: str
    eos_token_ids: tuple[int, ...]
    is_matryoshka: bool = False  # whether embeddings may be cut
    matryoshka_dimensions: tuple[int, ...] = ()  # to which sizes; none: to any
    default_sampling_params: SamplingDefaults = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class EngineLoad:
    """Gauges and counters of an engine at one moment."""

    num_waiting: int
    num_running: int
    num_free_pages: int
    num_cached_pages: int
    num_total_pages: int
    num_steps: int
    num_preemptions: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_finished: int
    num_aborted: int
    num_shed: int
    num_queried_tokens: int
    num_device_hit_tokens: int
    num_store_hit_tokens: int
    num_restored_tokens: int
    compiles_before_ready: int
    compiles_after_ready: int
    compiles_planned: int = 0
    num_host_pages: int = 0
    num_disk_pages: int = 0
    num_corrupt_pages: int = 0
    num_predictions: int = 0
    prediction_mae: float = 0.0
    prediction_bucket_accuracy: float = 0.0
    prediction_kendall_tau: float = 0.0

    @property
    def num_used_pages(self) -> int:
        """KV pages that requests hold."""
        return self.num_total_pages - self.num_free_pages - self.num_cached_pages


class KvMap(NamedTuple):
    """Where the KV pages of an engine are at one moment.

    Attributes:
        device: per data shard, its pool.
        host, disk: the tiers below; None without a page store.
    """

    device: list[PageMap]
    host: TierStats | None
    disk: TierStats | None
