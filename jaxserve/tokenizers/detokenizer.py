"""Turns a stream of tokens into a stream of text."""

import codecs

from jaxserve.tokenizers.base import Tokenizer


class IncrementalDetokenizer:
    """Emits the text of tokens as soon as it is certain, in constant time per token.

    Everything pushed and flushed, joined, equals `tokenizer.decode` of all the tokens. A
    character is never split: bytes that may still become one wait for the next token (three
    bytes at most), and bytes that no longer can become U+FFFD.

    Args:
        tokenizer: whose tokens these are.
        skip_special_tokens: special tokens stand for no text.
        continues_text: the tokens continue a prompt's text, so the space before the first
            word of a SentencePiece model belongs to the text and stays. (`decode` cannot
            know of a prompt; this is the one way to differ from it.)
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        *,
        continues_text: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._drop_space = tokenizer.drops_leading_space and not continues_text
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take one token; returns the text that has become certain, often all of it."""
        piece = self._tokenizer.token_bytes(token_id, skip_special_tokens=self._skip)
        if self._drop_space and piece:
            self._drop_space = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """The end: an unfinished character, if there is one, becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)
