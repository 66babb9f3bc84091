"""Tokenizers of the Hugging Face `tokenizers` library (tokenizer.json)."""

import functools
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, normalizers

from jaxserve.core.errors import CheckpointError
from jaxserve.tokenizers.base import Tokenizer
from jaxserve.tokenizers.settings import TokenizerSettings, read_settings

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_alphabet() -> dict[str, int]:
    """The 256 characters that byte-level BPE writes bytes as (GPT-2's `bytes_to_unicode`).

    Bytes that are visible characters in Latin-1 stand for themselves; the others get the
    characters from U+0100 on, in order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(byte): byte for byte in visible}
    hidden = (byte for byte in range(256) if byte not in visible)
    return alphabet | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, or what has been built to be like one.

    Args:
        backend: the library's tokenizer; must be byte-level or SentencePiece-like.
        settings: see there.

    Raises:
        CheckpointError: the decoder is of a kind whose tokens have no bytes (WordPiece, ...).
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: TokenizerSettings) -> None:
        backend.no_truncation()  # a prompt that is too long is an error, not half a prompt
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._added = {i: token.content for i, token in added.items()}
        self._alphabet = byte_level_alphabet()
        steps = {step["type"]: step for step in _decoder_steps(backend)}
        self._is_byte_level = "ByteLevel" in steps
        self._has_byte_pieces = "ByteFallback" in steps
        if not self._is_byte_level and not {"ByteFallback", "Metaspace", "Replace"} & set(steps):
            kinds = ", ".join(steps) or "none"
            raise CheckpointError(f"unsupported tokenizer: its decoder is {kinds}")
        super().__init__(
            settings,
            vocab_size=max([backend.get_vocab_size(), *(i + 1 for i in added)]),
            special_ids=[i for i, token in added.items() if token.special],
            drops_leading_space=_drops_leading_space(steps),
        )

    @classmethod
    def from_file(cls, path: Path) -> "HuggingFaceTokenizer":
        """Load a tokenizer.json and the configuration files beside it."""
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"cannot read {path} as a tokenizer.json: {error}") from error
        prefix, suffix = _added_around(backend)
        return cls(backend, read_settings(path.parent, backend.token_to_id, prefix, suffix))

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary, or None."""
        return self._backend.token_to_id(token)

    def _encode_text(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _encode_marked(self, text: str) -> list[int]:
        return self._marked_backend.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _marked_backend(self) -> tokenizers.Tokenizer:
        """The tokenizer with a normalizer that takes the marks out.

        The library looks for added tokens first, and so finds those that are not marked, then
        normalizes what is between them, and cuts that into pieces.
        """
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        steps: list[normalizers.Normalizer] = [
            normalizers.Replace(marked, plain)
            for marked, plain in self._control_marks.replacements()
        ]
        if backend.normalizer is not None:
            steps.append(backend.normalizer)
        backend.normalizer = normalizers.Sequence(steps)
        for token in backend.get_added_tokens_decoder().values():
            if token.normalized and token.content in self._control_marks.control:
                # It would be looked for after normalizing.
                raw = AddedToken(
                    token.content, special=token.special, normalized=False,
                    single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
                )  # fmt: skip
                backend.add_tokens([raw])
        return backend

    def _text_tokens(self) -> Collection[str]:
        return [token for i, token in self._added.items() if i not in self.special_ids]

    def _piece_bytes(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        piece = self._backend.id_to_token(token_id) if added is None else added
        if piece is None:  # a hole in the numbering
            return b""
        if self._is_byte_level:
            if added is not None or not all(c in self._alphabet for c in piece):
                return piece.encode()
            return bytes(self._alphabet[c] for c in piece)
        if self._has_byte_pieces and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return piece.replace("\u2581", " ").encode()

    def _save_vocabulary(self, directory: Path) -> None:
        self._backend.save(str(directory / "tokenizer.json"))


def _decoder_steps(backend: tokenizers.Tokenizer) -> Iterator[dict[str, Any]]:
    """The parts of the decoder as tokenizer.json writes them, sequences taken apart."""
    if backend.decoder is None:
        return
    pending = [json.loads(backend.decoder.__getstate__())]
    while pending:
        step = pending.pop(0)
        if step["type"] == "Sequence":
            pending = step["decoders"] + pending
        else:
            yield step


def _drops_leading_space(steps: dict[str, dict[str, Any]]) -> bool:
    strip, metaspace = steps.get("Strip"), steps.get("Metaspace")
    if strip is not None and strip.get("content") == " " and strip.get("start", 0) > 0:
        return True
    return metaspace is not None and metaspace.get("prepend_scheme", "always") != "never"


def _added_around(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts before and after a text."""
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start]), tuple(full[start + len(plain) :])
    raise CheckpointError("the tokenizer's post-processor changes the text's own tokens")
