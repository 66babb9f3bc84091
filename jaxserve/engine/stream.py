"""Host-side output of one request: tokens in, text and the verdict "stop or go on" out."""

from collections.abc import Collection

from jaxserve.core.errors import JaxserveError
from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.core.request import FinishReason, Request
from jaxserve.engine.outputs import TokenDelta
from jaxserve.engine.sampling_rules import SamplingRules
from jaxserve.engine.stop_strings import StopStrings
from jaxserve.tokenizers.base import Tokenizer
from jaxserve.tokenizers.detokenizer import IncrementalDetokenizer


class OutputStream:
    """Turns one request's sampled tokens into text deltas and applies its stopping rules.

    Args:
        request: the request; only read.
        tokenizer: the served model's tokenizer.
        eos_token_ids: tokens that end a generation unless `ignore_eos` is set.
        rules: which tokens may come next; None: any.

    Attributes:
        request, rules: as given.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        eos_token_ids: Collection[int],
        rules: SamplingRules | None = None,
    ) -> None:
        params = request.params
        self.request = request
        self.rules = rules
        self._eos = frozenset(() if params.ignore_eos else eos_token_ids)
        self._stop_tokens = frozenset(params.stop_token_ids) | self._eos
        self._min_tokens = params.min_tokens
        self._keeps_stop = params.include_stop_str_in_output
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, params.skip_special_tokens, continues_text=True
        )
        self._stop_strings = StopStrings(params.stop, keep=self._keeps_stop)
        self.num_output_tokens = 0

    def push(self, token_id: int, logprobs: TokenLogprobs | None = None) -> TokenDelta:
        """Take the next token; the delta's `finish_reason` says whether it was the last.

        Args:
            token_id: the token.
            logprobs: its log-probabilities, if the request asked for them.
        """
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
            stop_reason=stop_reason,
            error=error,
        )
