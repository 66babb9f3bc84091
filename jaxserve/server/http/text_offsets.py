"""Where in a text each of its tokens begins, in characters: `text_offset` of completions."""

import codecs

from jaxserve.tokenizers.base import Tokenizer


class TextOffsets:
    """Finds the offsets of tokens that come one after another.

    A token that begins inside of a character has that character's offset; one that stands for no
    text has that of what comes next. Bytes that are no character count as the U+FFFD that the
    text has for them.

    Args:
        tokenizer: the served model's.
        start: characters of the text before the first token.
        skip_special_tokens: special tokens stand for no text.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, start: int = 0, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._chars = start  # of the text so far, without a character that is not complete
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def of(self, token_id: int) -> int:
        """The offset of the next token."""
        return self._push(self._tokenizer.token_bytes(token_id, skip_special_tokens=self._skip))

    def of_prompt(self, token_id: int, prompt: str) -> int:
        """The offset of the next token in a given text, which the tokenizer may have added to.

        Special tokens that the text does not spell out are none of it, and neither is the space
        that some tokenizers put before the first word.
        """
        piece = self._tokenizer.token_bytes(token_id, skip_special_tokens=False)
        at = self._chars
        if token_id in self._tokenizer.special_ids:
            is_spelled_out = prompt.startswith(piece.decode("utf-8", errors="replace"), at)
            piece = piece if is_spelled_out else b""
        if not at and self._tokenizer.drops_leading_space and not prompt.startswith(" "):
            piece = piece.removeprefix(b" ")
        return self._push(piece)

    def _push(self, piece: bytes) -> int:
        if not piece:
            return self._chars
        self._chars += len(self._utf8.decode(piece[:1]))
        waits, _ = self._utf8.getstate()  # the first byte among others of its character
        first = self._chars if waits else self._chars - 1
        self._chars += len(self._utf8.decode(piece[1:]))
        return first
