"""What a caller may ask of the sampler and of the stopping rules."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.grammar import Grammar
from jaxserve.core.plain_values import boolean, integer, integers, listed, number, string

MAX_STOP_STRINGS = 16
MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300  # entries, as in OpenAI's API
MAX_BAD_WORDS = 64
MAX_STRING_CHARS = 4096  # of a stop string or a bad word: the engine's thread goes through them


_NUMBERS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
_INTEGERS = ("top_k", "min_tokens")
_MAYBE_INTEGERS = ("seed", "max_tokens", "logprobs", "prompt_logprobs")
_BOOLEANS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")


@dataclasses.dataclass(frozen=True)
class ThinkingBudget:
    """How long a model may think before it has to answer.

    Attributes:
        max_tokens: tokens between the two markers, at most.
        start_ids, end_ids: the markers' tokens, such as those of `<think>` and `</think>`.
        begins_inside: the prompt ends with the start marker already.

    Raises:
        InvalidRequest: the budget is negative, or a marker is empty.
    """

    max_tokens: int
    start_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    begins_inside: bool = False

    def __post_init__(self) -> None:
        for field in ("start_ids", "end_ids"):
            object.__setattr__(self, field, tuple(integers(field, getattr(self, field))))
            _check_token_ids(field, getattr(self, field))
        budget = integer("thinking_token_budget", self.max_tokens)
        object.__setattr__(self, "max_tokens", budget)
        object.__setattr__(self, "begins_inside", boolean("begins_inside", self.begins_inside))
        if self.max_tokens < 0:
            raise InvalidRequest(
                f"thinking_token_budget must not be negative, got {self.max_tokens}",
                param="thinking_token_budget",
            )
        if not self.start_ids or not self.end_ids:
            raise InvalidRequest(
                "this model has no markers of thinking, so no budget for it",
                param="thinking_token_budget",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping settings of one request (names and defaults as in vLLM).

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it before filtering.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this, in [0, 1];
            0 keeps the most likely one.
        min_p: drop tokens less likely than `min_p` times the most likely one, in [0, 1].
        seed: makes the request's tokens reproducible; None draws a fresh seed.
        max_tokens: tokens to generate at most; None runs to the model's context length. An answer
            ends there in any case; servers refuse to be asked for more. With `prompt_logprobs`
            it may be 0: then these are all that is wanted.
        stop: strings that end the generation; they are not part of the returned text.
        stop_token_ids: tokens that end the generation, beside the model's own EOS.
        ignore_eos: generate on past the model's EOS tokens (for benchmarks).
        min_tokens: no EOS, stop token or stop string ends the answer until it has so many tokens.
            A grammar does: an answer that is complete cannot go on.
        include_stop_str_in_output: the stop string, or the text of the stop token, that ended the
            answer belongs to its text.
        skip_special_tokens: special tokens stand for no text in the answer.
        repetition_penalty: divides positive and multiplies negative logits of tokens that the
            prompt or the answer has (CTRL; Keskar et al. 2019), in (0, 100]; 1 changes nothing.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens that the answer
            has, once and per occurrence, in [-2, 2] (OpenAI's API).
        logit_bias: added to the logits of these tokens, in [-100, 100]; given as a mapping.
        allowed_token_ids: no other tokens are sampled; None allows all.
        bad_words: texts that the answer never has, beginning at a token's border.
        logprobs: log-probabilities of each token of the answer, and of so many of the most
            likely ones; None for neither.
        prompt_logprobs: likewise for the prompt's tokens, from the second on. Of several answers
            to a prompt only the first one asks for them; see `of_answer`.
        grammar: what the answer must look like.
        thinking: how long the model may think. With a grammar, thinking may come before what the
            grammar is for.

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
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    thinking: ThinkingBudget | None = None

    def __post_init__(self) -> None:
        self._freeze()
        stop = self.stop
        for field in _NUMBERS:
            if not math.isfinite(getattr(self, field)):
                raise InvalidRequest(f"{field} must be a finite number", param=field)
        if not 0 <= self.temperature <= 100:
            raise InvalidRequest(
                f"temperature must be in [0, 100], got {self.temperature}", param="temperature"
            )
        if self.top_k < -1 or self.top_k >= 2**31:
            raise InvalidRequest(
                f"top_k must be -1, 0 or a positive int32, got {self.top_k}", param="top_k"
            )
        if not 0 <= self.top_p <= 1:
            raise InvalidRequest(f"top_p must be in [0, 1], got {self.top_p}", param="top_p")
        if not 0 <= self.min_p <= 1:
            raise InvalidRequest(f"min_p must be in [0, 1], got {self.min_p}", param="min_p")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise InvalidRequest(f"seed must be in [0, 2**64), got {self.seed}", param="seed")
        least = 1 if self.prompt_logprobs is None else 0
        if self.max_tokens is not None and self.max_tokens < least:
            raise InvalidRequest(
                f"max_tokens must be at least {least}, got {self.max_tokens}", param="max_tokens"
            )
        if len(stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(
                f"at most {MAX_STOP_STRINGS} stop strings, got {len(stop)}", param="stop"
            )
        if not all(stop):
            raise InvalidRequest("stop strings must be non-empty strings", param="stop")
        _check_lengths("stop", stop)
        _check_token_ids("stop_token_ids", self.stop_token_ids)
        self._check_shaping()
        self._check_logprobs()

    def _freeze(self) -> None:
        """Every field gets its plain type; lists and mappings become tuples."""
        plain: dict[str, Any] = {}
        for field in _NUMBERS:
            plain[field] = number(field, getattr(self, field))
        for field in _INTEGERS:
            plain[field] = integer(field, getattr(self, field))
        for field in _BOOLEANS:
            plain[field] = boolean(field, getattr(self, field))
        for field in _MAYBE_INTEGERS:
            if getattr(self, field) is not None:
                plain[field] = integer(field, getattr(self, field))
        for field in ("stop", "bad_words"):
            plain[field] = _strings(field, getattr(self, field))
        plain["stop_token_ids"] = tuple(integers("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            allowed = integers("allowed_token_ids", self.allowed_token_ids)
            plain["allowed_token_ids"] = tuple(allowed)
        plain["logit_bias"] = _biases(self.logit_bias)
        for field, kind in (("grammar", Grammar), ("thinking", ThinkingBudget)):
            if not isinstance(getattr(self, field), kind | None):
                raise InvalidRequest(f"{field} must be a {kind.__name__}", param=field)
        for field, value in plain.items():
            object.__setattr__(self, field, value)

    def _check_shaping(self) -> None:
        if self.min_tokens < 0:
            raise InvalidRequest(
                f"min_tokens must not be negative, got {self.min_tokens}", param="min_tokens"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}",
                param="min_tokens",
            )
        if not 0 < self.repetition_penalty <= 100:
            raise InvalidRequest(
                f"repetition_penalty must be in (0, 100], got {self.repetition_penalty}",
                param="repetition_penalty",
            )
        for field in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, field) <= 2:
                raise InvalidRequest(
                    f"{field} must be in [-2, 2], got {getattr(self, field)}", param=field
                )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(
                f"logit_bias has more than {MAX_LOGIT_BIAS} entries", param="logit_bias"
            )
        _check_token_ids("logit_bias", (token for token, _ in self.biases))
        if not all(-100 <= value <= 100 for _, value in self.biases):
            raise InvalidRequest("logit_bias values must be in [-100, 100]", param="logit_bias")
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise InvalidRequest(
                    "allowed_token_ids is empty: no token could be sampled",
                    param="allowed_token_ids",
                )
            _check_token_ids("allowed_token_ids", self.allowed_token_ids)
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise InvalidRequest(
                f"at most {MAX_BAD_WORDS} bad_words, got {len(self.bad_words)}", param="bad_words"
            )
        if not all(self.bad_words):
            raise InvalidRequest("bad_words must be non-empty strings", param="bad_words")
        _check_lengths("bad_words", self.bad_words)

    def _check_logprobs(self) -> None:
        for field in ("logprobs", "prompt_logprobs"):
            value = getattr(self, field)
            if value is not None and not 0 <= value <= MAX_LOGPROBS:
                raise InvalidRequest(
                    f"{field} must be in [0, {MAX_LOGPROBS}], got {value}", param=field
                )

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as (token, value) pairs."""
        return self.logit_bias  # type: ignore[return-value] - frozen at the start

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @functools.cached_property
    def sampled_late(self) -> bool:
        """Whether a token is sampled only when the host knows all those before it.

        See `StepRow.late`.
        """
        return (
            self.has_penalties
            or bool(self.logit_bias)
            or self.allowed_token_ids is not None
            or bool(self.bad_words)
            or self.min_tokens > 0
            or self.logprobs is not None
            or self.grammar is not None
            or self.thinking is not None
        )

    def of_answer(self, index: int) -> "SamplingParams":
        """Those of one of several answers to a prompt.

        With a seed, each one has its own, counted on. The prompt's log-probabilities are the same
        for all, so that they come with the first answer, unless nothing else is wanted at all.
        """
        if not index or self.max_tokens == 0:
            return self
        seed = None if self.seed is None else (self.seed + index) & MAX_SEED
        return dataclasses.replace(self, seed=seed, prompt_logprobs=None)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


def _strings(field: str, values: Any) -> tuple[str, ...]:
    """One string or several."""
    if isinstance(values, str):
        values = (values,)
    return tuple(string(field, each) for each in listed(field, values))


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    """`logit_bias` as pairs, from a mapping, whose keys JSON makes strings, or from pairs."""
    pairs = listed("logit_bias", given.items() if isinstance(given, Mapping) else given)
    biases: list[tuple[int, float]] = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InvalidRequest("logit_bias must map tokens to numbers", param="logit_bias")
        token, value = pair
        if isinstance(token, str) and token.isascii() and token.isdecimal() and len(token) < 20:
            token = int(token)
        biases.append((integer("logit_bias", token), number("logit_bias", value)))
    return tuple(biases)


def _check_lengths(field: str, strings: Iterable[str]) -> None:
    longest = max(map(len, strings), default=0)
    if longest > MAX_STRING_CHARS:
        raise InvalidRequest(
            f"a string of {field} may have {MAX_STRING_CHARS} characters, one has {longest}",
            param=field,
        )


def _check_token_ids(field: str, ids: Iterable[int]) -> None:
    if any(t < 0 or t >= 2**31 for t in ids):
        raise InvalidRequest(f"{field} must be non-negative int32 values", param=field)
