"""Host-side output of one request: tokens in, text and the verdict "stop or go on" out."""

import abc
from collections.abc import Collection

import numpy as np

from jaxserve.core.errors import JaxserveError
from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.request import FinishReason, Request
from jaxserve.engine.outputs import Embedding, TokenDelta
from jaxserve.engine.prompt_states import PromptPooler, PromptScorer, PromptStates
from jaxserve.engine.sampling_rules import SamplingRules
from jaxserve.engine.stop_strings import StopStrings
from jaxserve.tokenizers.base import Tokenizer
from jaxserve.tokenizers.detokenizer import IncrementalDetokenizer


class RequestStream(abc.ABC):
    """What the engine keeps of a request that has not ended, beside the scheduler.

    Attributes:
        request: the request.
        rules: which tokens may come next; None: any.
        num_output_tokens: tokens of the answer that were delivered.
    """

    def __init__(
        self,
        request: Request,
        rules: SamplingRules | None = None,
        prompt_states: PromptStates | None = None,
    ) -> None:
        self.request = request
        self.rules = rules
        self.num_output_tokens = 0
        self._prompt_states = prompt_states
        request.wants_hidden = prompt_states is not None and not prompt_states.is_complete

    def take_hidden(self, start: int, hidden: np.ndarray) -> None:
        """Take the hidden states of prompt tokens from position `start` on: [tokens, hidden]."""
        if self._prompt_states is not None:
            self._prompt_states.take(start, hidden)
            # Should it be preempted later, it may take its prompt from a cache like any other.
            self.request.wants_hidden = not self._prompt_states.is_complete

    @abc.abstractmethod
    def push(self, token_id: int, logprobs: TokenLogprobs | None = None) -> TokenDelta:
        """Take the next token; the delta's `finish_reason` says whether it was the last.

        Args:
            token_id: the token.
            logprobs: its log-probabilities, if the request asked for them.
        """

    @abc.abstractmethod
    def ended(self, reason: FinishReason, error: JaxserveError | None = None) -> TokenDelta:
        """The last delta of a request that ended without a last token."""


class EmbeddingStream(RequestStream):
    """A request for a prompt's embedding; its one token, that every request has, goes unused.

    Args:
        request: the request.
        pooler: makes one vector of its prompt's states.
    """

    def __init__(self, request: Request, pooler: PromptPooler) -> None:
        super().__init__(request, prompt_states=pooler)
        self._pooler = pooler

    def push(self, token_id: int, logprobs: TokenLogprobs | None = None) -> TokenDelta:
        """The prompt is computed: the one delta, with the embedding."""
        return self._delta(FinishReason.STOP, embedding=self._pooler.embedding())

    def ended(self, reason: FinishReason, error: JaxserveError | None = None) -> TokenDelta:
        """The one delta, without an embedding."""
        return self._delta(reason, error=error)

    def _delta(
        self,
        reason: FinishReason,
        embedding: Embedding | None = None,
        error: JaxserveError | None = None,
    ) -> TokenDelta:
        return TokenDelta(
            request_id=self.request.request_id,
            text="",
            token_ids=(),
            finish_reason=reason,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_output_tokens=0,
            num_cached_tokens=0,
            error=error,
            embedding=embedding,
        )


class OutputStream(RequestStream):
    """Turns one request's sampled tokens into text deltas and applies its stopping rules.

    Args:
        request: the request; only read.
        tokenizer: the served model's tokenizer.
        eos_token_ids: tokens that end a generation unless `ignore_eos` is set.
        rules: which tokens may come next; None: any.
        scorer: makes the prompt's log-probabilities, if the request asked for them.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        eos_token_ids: Collection[int],
        rules: SamplingRules | None = None,
        scorer: PromptScorer | None = None,
    ) -> None:
        super().__init__(request, rules, scorer)
        params = request.params
        self._scorer = scorer
        self._eos = frozenset(() if params.ignore_eos else eos_token_ids)
        self._stop_tokens = frozenset(params.stop_token_ids) | self._eos
        self._min_tokens = params.min_tokens
        self._keeps_stop = params.include_stop_str_in_output
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, params.skip_special_tokens, continues_text=True
        )
        self._stop_strings = StopStrings(params.stop, keep=self._keeps_stop)

    def push(self, token_id: int, logprobs: TokenLogprobs | None = None) -> TokenDelta:
        """Take the next token; the delta's `finish_reason` says whether it was the last.

        Args:
            token_id: the token.
            logprobs: its log-probabilities, if the request asked for them.
        """
        if not self.request.is_answered:
            return self._delta((), "", FinishReason.LENGTH)
        self.num_output_tokens += 1
        logs = () if logprobs is None else (logprobs,)
        may_stop = self.num_output_tokens > self._min_tokens
        if token_id in self._stop_tokens and may_stop:
            text = (
                self._stop_strings.push(self._detokenizer.push(token_id))
                if self._keeps_stop
                else ""
            )
            cause = None if token_id in self._eos else token_id
            return self._delta(
                (token_id,), text + self._flush(), FinishReason.STOP, logs, stop_reason=cause
            )
        text = self._stop_strings.push(self._detokenizer.push(token_id), armed=may_stop)
        reason = FinishReason.STOP if self._stop_strings.stopped else None
        if reason is None and self.num_output_tokens >= self.request.max_tokens:
            text += self._flush()
            reason = FinishReason.STOP if self._stop_strings.stopped else FinishReason.LENGTH
        return self._delta((token_id,), text, reason, logs, stop_reason=self._stop_strings.found)

    def ended(self, reason: FinishReason, error: JaxserveError | None = None) -> TokenDelta:
        """The last delta of a request that ended without a last token."""
        return self._delta((), self._flush(), reason, error=error)

    def _flush(self) -> str:
        text = self._stop_strings.push(self._detokenizer.flush())
        return text if self._stop_strings.stopped else text + self._stop_strings.flush()

    def _delta(
        self,
        token_ids: tuple[int, ...],
        text: str,
        finish_reason: FinishReason | None,
        logprobs: tuple[TokenLogprobs, ...] = (),
        *,
        stop_reason: int | str | None = None,
        error: JaxserveError | None = None,
    ) -> TokenDelta:
        return TokenDelta(
            request_id=self.request.request_id,
            text=text,
            token_ids=token_ids,
            finish_reason=finish_reason,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_output_tokens=self.num_output_tokens,
            num_cached_tokens=self.request.num_reused_tokens or 0,
            logprobs=logprobs,
            prompt_logprobs=self._take_prompt_logprobs() if self._scorer is not None else None,
            stop_reason=stop_reason,
            error=error,
        )

    def _take_prompt_logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        """The prompt's log-probabilities, for the first delta."""
        scorer = self._scorer
        if scorer is None or not scorer.is_complete:  # it ended before
            return None
        self._scorer = None
        return tuple(scorer.logprobs)
