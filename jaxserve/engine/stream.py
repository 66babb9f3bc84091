"""Host-side output of one request: tokens in, text and the verdict "stop or go on" out."""

from collections.abc import Collection

from jaxserve.core.request import FinishReason, Request
from jaxserve.engine.outputs import TokenDelta
from jaxserve.engine.stop_strings import StopStrings
from jaxserve.tokenizers.base import Tokenizer
from jaxserve.tokenizers.detokenizer import IncrementalDetokenizer


class OutputStream:
    """Turns one request's sampled tokens into text deltas and applies its stopping rules.

    Args:
        request: the request; only read.
        tokenizer: the served model's tokenizer.
        eos_token_ids: tokens that end a generation unless `ignore_eos` is set.

    Attributes:
        request: the request.
    """

    def __init__(
        self, request: Request, tokenizer: Tokenizer, eos_token_ids: Collection[int]
    ) -> None:
        self.request = request
        self._stop_tokens = frozenset(request.params.stop_token_ids)
        if not request.params.ignore_eos:
            self._stop_tokens |= frozenset(eos_token_ids)
        self._detokenizer = IncrementalDetokenizer(tokenizer, continues_text=True)
        self._stop_strings = StopStrings(request.params.stop)
        self.num_output_tokens = 0

    def push(self, token_id: int) -> TokenDelta:
        """Take the next token; the delta's `finish_reason` says whether it was the last."""
        self.num_output_tokens += 1
        if token_id in self._stop_tokens:
            return self._delta((token_id,), self._flush(), FinishReason.STOP)
        text = self._stop_strings.push(self._detokenizer.push(token_id))
        if self._stop_strings.stopped:
            return self._delta((token_id,), text, FinishReason.STOP)
        if self.num_output_tokens >= self.request.max_tokens:
            text += self._flush()
            stopped = self._stop_strings.stopped
            return self._delta(
                (token_id,), text, FinishReason.STOP if stopped else FinishReason.LENGTH
            )
        return self._delta((token_id,), text, None)

    def ended(self, reason: FinishReason) -> TokenDelta:
        """The last delta of a request that ended without a last token."""
        return self._delta((), self._flush(), reason)

    def _flush(self) -> str:
        text = self._stop_strings.push(self._detokenizer.flush())
        return text if self._stop_strings.stopped else text + self._stop_strings.flush()

    def _delta(
        self, token_ids: tuple[int, ...], text: str, finish_reason: FinishReason | None
    ) -> TokenDelta:
        return TokenDelta(
            request_id=self.request.request_id,
            text=text,
            token_ids=token_ids,
            finish_reason=finish_reason,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_output_tokens=self.num_output_tokens,
            num_cached_tokens=self.request.num_reused_tokens or 0,
        )
