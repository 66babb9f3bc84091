"""Compiles grammars over the served tokenizer's vocabulary, with the `llguidance` library."""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import llguidance
import numpy as np

from jaxserve.core.errors import InvalidRequest, RequestFailed
from jaxserve.core.grammar import DEFAULT_WHITESPACE, Grammar
from jaxserve.engine.ebnf import as_lark, is_ebnf
from jaxserve.engine.grammar_errors import explained
from jaxserve.engine.token_masks import num_words
from jaxserve.tokenizers.base import Tokenizer

MAX_CACHED_GRAMMARS = 128
_NAMES = {
    "json_object": "JSON's layout", "json_schema": "schema", "regex": "regular expression",
    "lark": "grammar", "choice": "choice",
}  # fmt: skip

# What may stand between two parts of a JSON text, by `EngineConfig.json_whitespace`. Without a
# bound a model may write blanks for ever.
JSON_WHITESPACE = {
    "little": DEFAULT_WHITESPACE,
    "compact": "",
    "any": r"[\x20\x0A\x0D\x09]{1,40}",
}

# The model chooses how forced text is cut into tokens. llguidance would ask the tokenizer for the
# one right way; but not every tokenizer can encode a text that goes on in the middle of a word.
_OPTIONS = '\n%llguidance {"no_forcing": true}'


class GrammarCompiler:
    """Makes matchers of grammars, and keeps those that were compiled last.

    Safe to call from several threads, which wait for each other only for the tokenizer.

    Args:
        tokenizer: the served model's.
        vocab_size: the model's; ids that the tokenizer does not have are never allowed.
        json_whitespace: a name of `JSON_WHITESPACE`, for grammars that do not say themselves.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, json_whitespace: str = "little"
    ) -> None:
        self._json_whitespace = JSON_WHITESPACE[json_whitespace]
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()

    def compile(self, grammar: Grammar) -> "GrammarMatcher":
        """A matcher at the grammar's beginning.

        Raises:
            InvalidRequest: it is no valid grammar, uses what llguidance does not support, or is
                too large; the message says which and where.
        """
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
                return GrammarMatcher(compiled.deep_copy())
            vocabulary = self._vocabulary = self._vocabulary or self._read_vocabulary()
        compiled = llguidance.LLMatcher(vocabulary, self._lark(grammar), log_level=0)
        if not compiled.is_error():
            compiled.compute_bitmask()  # what is too complex to begin with is refused now
        if compiled.is_error():
            problem = explained(_written_in(grammar), grammar.source, compiled.get_error())
            raise InvalidRequest(
                f"the {_NAMES[grammar.kind]} cannot be used: {problem}", param="grammar"
            )
        with self._lock:
            self._compiled[grammar] = compiled
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > MAX_CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
            return GrammarMatcher(compiled.deep_copy())

    def _lark(self, grammar: Grammar) -> str:
        """The grammar in llguidance's dialect of Lark, in the JSON in which it takes one."""
        if grammar.kind == "lark":
            lark = as_lark(grammar.source)
        elif grammar.kind == "regex":
            lark = f"start: /{llguidance.regex_to_lark(grammar.source, '')}/"
        elif grammar.kind == "choice":
            options = " | ".join(json.dumps(option) for option in json.loads(grammar.source))
            # A name in capitals is one automaton; as a rule, each option would be a state.
            lark = f"start: CHOICE\nCHOICE: {options}"
        else:
            lark = f"start: {grammar.json_rule()}"
        lark = _with_whitespace(lark, self._json_whitespace)
        return llguidance.LLMatcher.grammar_from_lark(lark + _OPTIONS)

    def _read_vocabulary(self) -> llguidance.LLTokenizer:
        return llguidance.LLTokenizer(_Vocabulary(self._tokenizer, self._vocab_size))  # type: ignore[arg-type]


class _Vocabulary:
    """A tokenizer's tokens as llguidance asks for them; see its `TokenizerWrapper`.

    Without an EOS of its own llguidance takes the first id after the vocabulary for one, and
    allows it where the grammar is complete: `GrammarMatcher` reads that off the mask.
    """

    is_tokenizer_wrapper = True
    eos_token_id = None
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokens = [
            tokenizer.token_bytes(i, skip_special_tokens=False) for i in range(vocab_size)
        ]
        self.special_token_ids = sorted(i for i in tokenizer.special_ids if i < vocab_size)

    def __call__(self, text: str | bytes) -> list[int]:
        raise NotImplementedError("no text is encoded where no tokens are forced")


class GrammarMatcher:
    """How far an answer has come in its grammar.

    Args:
        matcher: llguidance's; from now on only this state may use it.
    """

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def push(self, token_id: int) -> None:
        """Take the answer's next token.

        Raises:
            RequestFailed: the grammar has become too complex, or does not allow the token.
        """
        if not self._matcher.consume_token(token_id):
            raise self.error()

    def error(self) -> RequestFailed:
        """What went wrong, if anything did."""
        cause = explained("", "", self._matcher.get_error())
        return RequestFailed(f"the request's grammar cannot be followed further: {cause}")


class GrammarState(NamedTuple):
    """What may come next in a grammar.

    Attributes:
        mask: uint32 [words], see `token_masks`; without tokens that only end the answer.
        is_complete: whether the answer may end here.
    """

    mask: np.ndarray
    is_complete: bool


class MaskFiller:
    """Asks many matchers at once what may come next, on threads of llguidance's own.

    Args:
        vocab_size: the model's.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._threads: llguidance.LLExecutor | None = None

    def fill(self, matchers: Sequence[GrammarMatcher]) -> list[GrammarState | RequestFailed]:
        """For each matcher what may come next, or why that cannot be told."""
        if not matchers:
            return []
        self._threads = self._threads or llguidance.LLExecutor()
        # The id after the vocabulary is llguidance's EOS.
        words = num_words(self._vocab_size + 1)
        masks = np.zeros((len(matchers), words), np.uint32)
        self._threads.unsafe_compute_mask_ptr(
            [(matcher._matcher, i) for i, matcher in enumerate(matchers)],
            masks.ctypes.data,
            words * 4,
            len(matchers),
        )
        word, bit = divmod(self._vocab_size, 32)
        complete = (masks[:, word] >> np.uint32(bit) & 1).astype(bool)
        masks[:, word] &= np.uint32((1 << bit) - 1)
        masks = masks[:, : num_words(self._vocab_size)]
        return [
            matcher.error()
            if matcher._matcher.is_error()
            else GrammarState(mask, bool(is_complete))
            for matcher, mask, is_complete in zip(matchers, masks, complete, strict=True)
        ]


def _with_whitespace(lark: str, pattern: str) -> str:
    """A grammar in which this is what the JSON parts have where they ask for the engine's."""
    asked = json.dumps({"whitespace_pattern": DEFAULT_WHITESPACE})[1:-1]
    layout = {"whitespace_pattern": pattern} if pattern else {"whitespace_flexible": False}
    return lark.replace(asked, json.dumps(layout)[1:-1])


def _written_in(grammar: Grammar) -> str:
    """The grammar's kind; EBNF is told from Lark, whose places are kept when it is compiled."""
    return "ebnf" if grammar.kind == "lark" and is_ebnf(grammar.source) else grammar.kind
