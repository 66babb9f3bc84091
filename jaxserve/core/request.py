"""The one mutable object that travels through the whole server with a request."""

import dataclasses
import enum
import itertools

from jaxserve.core.errors import InvalidRequest
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
    ERROR = "error"  # it could not go on
    SHED = "shed"  # given up before its first token: it could not meet its target any more

    @property
    def is_natural(self) -> bool:
        """Whether the answer came to its own end, at which nothing cut it off."""
        return self in (FinishReason.STOP, FinishReason.LENGTH)


@dataclasses.dataclass(eq=False, kw_only=True, slots=True)
class Request:
    """A prompt, its settings and how far the engine has come with it.

    The scheduler's whole arithmetic is in three counters over one row of tokens::

        prompt_token_ids            output_token_ids    pending
        |---------------------------|-------------------|--|
        |<-------- num_computed_tokens -------->|
                                                |<-------->| still to schedule

    * `num_computed_tokens`: tokens whose KV is in this request's pages, counting steps that
      are launched but not yet collected, and tokens whose KV was found in a cache.
    * `num_pending_tokens`: tokens sampled on the device in launched steps that the host has
      not seen yet (their values live in the device's token of this request's slot).
    * `num_tokens`: prompt + output + pending, and `max_num_tokens`: where it must end. Plain
      numbers, since they are read at every step.

    Chunked prefill, preemption (counters back to zero), prefix reuse and overlap are arithmetic
    on these.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    service: ServiceParams = dataclasses.field(default_factory=ServiceParams)
    max_tokens: int  # resolved: params.max_tokens, cut to what the context allows
    seed: int = 0  # resolved: params.seed, or one drawn at arrival; uint32
    arrival_time: float = 0.0
    is_answered: bool = True  # False: only its prompt is wanted, its one token never looked at
    wants_hidden: bool = False  # its prompt's hidden states, so none of it comes from a cache
    key: int = dataclasses.field(default_factory=lambda: next(_keys))  # never reused

    state: RequestState = RequestState.WAITING
    output_token_ids: list[int] = dataclasses.field(default_factory=list)
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    num_tokens: int = dataclasses.field(init=False)
    max_num_tokens: int = dataclasses.field(init=False)
    num_preemptions: int = 0
    slot: int | None = None  # row of the device's last-token map, held while running
    shard: int = 0  # which part of the mesh's data axis holds its pages
    finish_reason: FinishReason | None = None

    # Its KV pages.
    page_ids: tuple[int, ...] = ()  # a tuple, since every step's row carries it
    page_keys: list[bytes] = dataclasses.field(default_factory=list)  # see cache/page_keys.py
    num_published_pages: int = 0  # its first ones, which others may share: only read from now on
    fetch_ticket: int | None = None  # its pages are on their way from the page store
    swapped_keys: list[bytes] = dataclasses.field(default_factory=list)  # of its pages there
    num_swapped_tokens: int = 0  # that those hold
    cached_estimate: int = 0  # tokens that a cache had when last looked, and those it gave
    num_reused_tokens: int | None = None  # those it did not compute when it first ran
    num_fetched_tokens: int = 0  # of those, what came from the page store

    # What policies go by.
    predicted_len: float | None = None  # answer tokens in all, as far as a predictor knows
    last_progress: float = 0.0  # when the last token was planned, or the arrival, in seconds
    is_overdue: bool = False  # without progress for too long: goes before those that are not
    num_slices: int = 0  # how often it made room for others
    slice_start: int = 0  # answer tokens it had when it last started

    # When what happened, in seconds on the clock of `arrival_time`; None: not yet.
    started_time: float | None = None  # it first got to run
    first_token_time: float | None = None
    last_token_time: float | None = None

    def __post_init__(self) -> None:
        self.num_tokens = (
            len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_pending_tokens
        )
        self.max_num_tokens = len(self.prompt_token_ids) + self.max_tokens

    def fit(self, max_model_len: int) -> None:
        """Cut the answer to what the context has room for.

        Raises:
            InvalidRequest: the prompt is empty or leaves no room, or no token is asked for.
        """
        prompt_len = len(self.prompt_token_ids)
        if prompt_len < 1:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if self.max_tokens < 1:
            raise InvalidRequest(
                f"max_tokens must be at least 1, got {self.max_tokens}", param="max_tokens"
            )
        room = max_model_len - prompt_len + (not self.is_answered)
        if room < 1:
            why = "leaves no room to answer" if self.is_answered else "is more than fits"
            raise InvalidRequest(
                f"the prompt has {prompt_len} tokens, which {why} in the context of "
                f"{max_model_len}",
                param="prompt",
            )
        self.max_tokens = min(self.max_tokens, room)
        self.max_num_tokens = prompt_len + self.max_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, those only the device knows included."""
        return self.num_tokens - len(self.prompt_token_ids)

    @property
    def has_all_tokens(self) -> bool:
        """Whether every token the request may have has at least been launched."""
        return self.num_tokens >= self.max_num_tokens

    @property
    def num_known_tokens(self) -> int:
        """Prompt and output tokens whose values the host has."""
        return self.num_tokens - self.num_pending_tokens

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended, for any reason."""
        return self.state is RequestState.FINISHED

    def known_tokens(self, start: int, end: int) -> list[int]:
        """The tokens at positions start..end-1 that the host knows (prompt, then output)."""
        prompt_len = len(self.prompt_token_ids)
        if end <= prompt_len:
            return self.prompt_token_ids[start:end]
        head = self.prompt_token_ids[start:]
        return head + self.output_token_ids[max(0, start - prompt_len) : end - prompt_len]
