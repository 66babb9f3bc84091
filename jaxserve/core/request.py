"""The one mutable object that travels through the whole server with a request."""

import dataclasses
import enum
import itertools

from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams

_keys = itertools.count()


class RequestState(enum.Enum):
    """Where a request stands; only the scheduler changes it."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    """Why a request ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    SHED = "shed"  # given up before its first token: it could not meet its target any more


@dataclasses.dataclass(eq=False, kw_only=True)
class Request:
    """A prompt, its settings and how far the engine has come with it.

    The scheduler's whole arithmetic is in three counters over one row of tokens::

        prompt_token_ids            output_token_ids    pending
        |---------------------------|-------------------|--|
        |<-------- num_computed_tokens -------->|
                                                |<-------->| still to schedule

    * `num_computed_tokens`: tokens whose KV is in this request's pages, counting steps that
      are launched but not yet collected.
    * `num_pending_tokens`: tokens sampled on the device in launched steps that the host has
      not seen yet (their values live in the device's token of this request's slot).
    * `num_tokens`: prompt + output + pending.

    Chunked prefill, preemption (counters back to zero) and overlap are arithmetic on these.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    service: ServiceParams = dataclasses.field(default_factory=ServiceParams)
    max_tokens: int  # resolved: params.max_tokens, cut to what the context allows
    seed: int = 0  # resolved: params.seed, or one drawn at arrival; uint32
    arrival_time: float = 0.0
    key: int = dataclasses.field(default_factory=lambda: next(_keys))  # never reused

    state: RequestState = RequestState.WAITING
    output_token_ids: list[int] = dataclasses.field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_pending_tokens: int = 0
    num_preemptions: int = 0
    page_ids: list[int] = dataclasses.field(default_factory=list)
    page_keys: list[bytes] = dataclasses.field(default_factory=list)  # see cache/page_keys.py
    slot: int | None = None  # row of the device's last-token map, held while running
    shard: int = 0  # which part of the mesh's data axis holds its pages
    finish_reason: FinishReason | None = None
    # What policies go by.
    predicted_len: float | None = None  # answer tokens in all, as far as a predictor knows
    last_progress: float = 0.0  # when the last token was planned, or the arrival, in seconds

    @property
    def num_tokens(self) -> int:
        """Tokens of the request so far, those only the device knows included."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, those only the device knows included."""
        return len(self.output_token_ids) + self.num_pending_tokens

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended, for whatever reason."""
        return self.state is RequestState.FINISHED

    def known_tokens(self, start: int, end: int) -> list[int]:
        """The tokens at positions start..end-1 that the host knows (prompt, then output)."""
        prompt_len = len(self.prompt_token_ids)
        if end <= prompt_len:
            return self.prompt_token_ids[start:end]
        head = self.prompt_token_ids[start:]
        return head + self.output_token_ids[max(0, start - prompt_len) : end - prompt_len]
