"""What the host adds to the sampling of one request: which tokens may come next."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxserve.core.errors import InvalidRequest, RequestFailed
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.bad_words import banned_next, spellings
from jaxserve.engine.grammars import GrammarCompiler, GrammarMatcher, GrammarState
from jaxserve.engine.thinking import ThinkingMeter
from jaxserve.engine.token_masks import all_tokens, mask_of
from jaxserve.tokenizers.base import Tokenizer


class Allowed(NamedTuple):
    """What may come next.

    Attributes:
        mask: uint32 [words], see `token_masks`; None: anything may. All zeros: nothing can.
        is_complete: the answer may end here as far as its grammar goes.
    """

    mask: np.ndarray | None
    is_complete: bool = False


class SamplingRules:
    """The rules of one request that depend on its answer so far.

    These are `allowed_token_ids`, `bad_words`, `min_tokens`, `grammar` and `thinking`. Where a
    request both thinks and has a grammar, the grammar is for what comes after the thinking, once;
    the thinking may only come first.

    Args:
        params: the request's.
        vocab_size: the model's.
        end_ids: tokens that end the answer.
        bad_words: the token sequences that must not come to be.
        matcher: of the grammar.
        token_bytes: the text of a token; see `ThinkingMeter`.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        end_ids: frozenset[int],
        bad_words: Sequence[tuple[int, ...]],
        matcher: GrammarMatcher | None,
        token_bytes: Callable[[int], bytes] | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._end = mask_of(end_ids, vocab_size)
        self._min_tokens = params.min_tokens
        allowed = params.allowed_token_ids
        self._always = all_tokens(vocab_size) if allowed is None else mask_of(allowed, vocab_size)
        self._always &= ~mask_of((w[0] for w in bad_words if len(w) == 1), vocab_size)
        self._is_limited = allowed is not None or bool(bad_words)
        self._bad_words = [word for word in bad_words if len(word) > 1]
        self._matcher = matcher
        self._thinking = ThinkingMeter(params.thinking, token_bytes) if params.thinking else None
        # Whether the answer so far is thinking that the grammar waits for.
        self._grammar_waits = matcher is not None and bool(
            params.thinking and params.thinking.begins_inside
        )
        self._may_open = matcher is not None and self._thinking is not None
        self._num_followed = 0

    def follow(self, answer: Sequence[int]) -> None:
        """Take in the tokens that the answer has got since the last call.

        Raises:
            RequestFailed: the grammar cannot be followed any further.
        """
        for token in answer[self._num_followed :]:
            self._push(token)
            self._num_followed += 1

    def _push(self, token: int) -> None:
        thinking = self._thinking
        if thinking is None or self._matcher is None:
            if thinking is not None:
                thinking.push(token)
            elif self._matcher is not None:
                self._matcher.push(token)
            return
        if not self._num_followed and self._may_open and token == thinking.next_of_start:
            self._grammar_waits = True
        if self._grammar_waits:
            was_inside = thinking.is_inside
            thinking.push(token)
            self._grammar_waits = thinking.is_inside or not was_inside
            if not self._grammar_waits and thinking.overshoot.strip():
                raise RequestFailed("the thinking ended within a token, so no grammar can follow")
        else:
            self._thinking = None  # the grammar's from here on, even what looks like thinking
            self._matcher.push(token)

    @property
    def matcher(self) -> GrammarMatcher | None:
        """What `MaskFiller` has to be asked about before `allowed` is called; None: nothing."""
        return None if self._grammar_waits else self._matcher

    def allowed(self, answer: Sequence[int], grammar: GrammarState | None = None) -> Allowed:
        """The tokens that may come next.

        Args:
            answer: its tokens so far; `follow` has seen them all.
            grammar: what `MaskFiller` says of `matcher`.
        """
        forced = self._forced()
        if forced is not None:
            return Allowed(mask_of((forced,), self._vocab_size))
        banned = banned_next(self._bad_words, answer)
        may_end = len(answer) >= self._min_tokens and not self._grammar_waits
        if grammar is None:
            if may_end and not banned and not self._is_limited:
                return Allowed(None)
            mask, is_complete = self._always.copy(), False
        else:
            mask, is_complete = grammar
            if is_complete:
                mask = mask | self._end
            if not answer:
                mask = self._with_opening(mask)
            mask = mask & self._always
        if not may_end:
            mask &= ~self._end
        for token in banned:
            if token < self._vocab_size:
                mask[token >> 5] &= ~np.uint32(1 << (token & 31))
        return Allowed(mask, is_complete)

    def _forced(self) -> int | None:
        if self._thinking is None:
            return None
        if self._grammar_waits and not self._thinking.is_inside:
            return self._thinking.next_of_start  # begun by a token that the grammar did not allow
        return self._thinking.forced

    def _with_opening(self, grammar: np.ndarray) -> np.ndarray:
        """The tokens that may come first, with the one that begins the thinking, if it may."""
        if not self._may_open or self._thinking is None:
            return grammar
        opening = mask_of((self._thinking.next_of_start,), self._vocab_size)
        # A grammar that may begin with this very token has it.
        self._may_open = not (grammar & opening).any()
        return grammar | opening


class RuleMaker:
    """Makes the rules of requests. Safe to call from several threads.

    Args:
        tokenizer: the served model's.
        vocab_size: the model's, which may be more than the tokenizer's.
        eos_token_ids: tokens that end an answer unless `ignore_eos` is set.
        json_whitespace: as in `EngineConfig`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        json_whitespace: str = "little",
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = frozenset(eos_token_ids)
        self._grammars = GrammarCompiler(tokenizer, vocab_size, json_whitespace)

    def is_slow(self, params: SamplingParams) -> bool:
        """Whether `make` is better called on a thread, where no event loop waits for it."""
        return params.grammar is not None or bool(params.bad_words)

    def make(self, params: SamplingParams) -> SamplingRules | None:
        """The rules of a request, or None if it has none.

        Raises:
            InvalidRequest: the grammar cannot be used, or a token is not in the vocabulary.
        """
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_ids("logit_bias", [token for token, _ in params.biases])
        if not (
            params.allowed_token_ids is not None
            or params.bad_words
            or params.min_tokens
            or params.grammar is not None
            or params.thinking is not None
        ):
            return None
        end = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            end |= self._eos
        grammar = params.grammar
        return SamplingRules(
            params,
            self._vocab_size,
            end,
            spellings(params.bad_words, self._tokenizer),
            self._grammars.compile(grammar) if grammar is not None else None,
            functools.partial(self._tokenizer.token_bytes, skip_special_tokens=False),
        )

    def _check_ids(self, field: str, token_ids: Sequence[int]) -> None:
        wrong = [token for token in token_ids if token >= self._vocab_size]
        if wrong:
            raise InvalidRequest(
                f"{field} has token {wrong[0]}; the vocabulary has {self._vocab_size}", param=field
            )
