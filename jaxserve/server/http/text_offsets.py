"""Where in a text each of its tokens begins, in characters: `text_offset` of completions."""

import codecs
from collections.abc import Iterator, Sequence

from jaxserve.tokenizers.base import Tokenizer


class TextOffsets:
    """Finds the offsets of pieces of a text that come one after another.

    A piece that begins inside of a character has that character's offset; one that stands for no
    text has that of what comes next, or of a character that is not complete yet. Bytes that are no
    character count as the U+FFFD that the text has for them.

    Args:
        start: characters of the text before the first piece.
    """

    def __init__(self, start: int = 0) -> None:
        self._chars = start  # of the text so far, without a character that is not complete
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, piece: bytes) -> int:
        """The offset of the next piece."""
        if not piece:
            return self._chars
        self._chars += len(self._utf8.decode(piece[:1]))
        waits, _ = self._utf8.getstate()  # the first byte among others of its character
        first = self._chars if waits else self._chars - 1
        self._chars += len(self._utf8.decode(piece[1:]))
        return first


def prompt_offsets(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """The offsets of a prompt's tokens in its text, to which the tokenizer may have added.

    What it adds is none of the text: special tokens around it, which the text may spell out
    besides, and a space before it. Where the tokens spell something else (some tokenizers
    normalise a text first), the special ones that the text has not are left out.

    Args:
        tokenizer: the served model's.
        ids: the prompt's tokens.
        text: the prompt as it was given.
    """
    pieces = [tokenizer.token_bytes(i, skip_special_tokens=False) for i in ids]
    for candidate in _without_added(tokenizer, pieces):
        if b"".join(candidate).decode("utf-8", errors="replace") == text:
            found = TextOffsets()
            return [found.push(piece) for piece in candidate]
    return _nearest(tokenizer, ids, pieces, text)


def _without_added(tokenizer: Tokenizer, pieces: Sequence[bytes]) -> Iterator[list[bytes]]:
    """The pieces, with nothing in place of what the tokenizer may have added."""
    before, after = len(tokenizer.settings.prefix_ids), len(tokenizer.settings.suffix_ids)
    for start, end in ((0, 0), (before, after)):
        kept = [piece if start <= i < len(pieces) - end else b"" for i, piece in enumerate(pieces)]
        yield kept
        if tokenizer.drops_leading_space:
            first = next((i for i, piece in enumerate(kept) if piece), 0)
            yield [p.removeprefix(b" ") if i == first else p for i, p in enumerate(kept)]


def _nearest(
    tokenizer: Tokenizer, ids: Sequence[int], pieces: Sequence[bytes], text: str
) -> list[int]:
    found, offsets = TextOffsets(), []
    for token_id, piece in zip(ids, pieces, strict=True):
        if token_id in tokenizer.special_ids:
            at, name = found.push(b""), piece.decode("utf-8", errors="replace")
            piece = piece if text.startswith(name, at) else b""
        offsets.append(found.push(piece))
    return offsets
