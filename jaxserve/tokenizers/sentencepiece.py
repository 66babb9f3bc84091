"""Tokenizers of the `sentencepiece` library (tokenizer.model)."""

import functools
import secrets
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import sentencepiece

from jaxserve.core.errors import CheckpointError
from jaxserve.tokenizers.base import Tokenizer
from jaxserve.tokenizers.sentencepiece_proto import user_defined_pieces, with_name
from jaxserve.tokenizers.settings import TokenizerSettings, read_json, read_settings
from jaxserve.tokenizers.special_splitter import SpecialTokenSplitter

_SPACE = "\u2581"  # how SentencePiece writes a space inside of a piece


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, and tokens that were added to it later.

    SentencePiece itself never finds its control tokens in a text, so the text is cut at them
    first and the parts are encoded one by one; where the model puts a space before a text,
    each part gets one, as in llama.cpp and (in its "legacy" way) transformers.

    Args:
        processor: the loaded model.
        settings: see there.
        added_tokens: names and ids that the model does not have, or that are to be found
            before it sees the text.
        special_ids: ids that stand for no text, beside the model's control tokens.
    """

    def __init__(
        self,
        processor: sentencepiece.SentencePieceProcessor,
        settings: TokenizerSettings,
        *,
        added_tokens: Mapping[str, int] | None = None,
        special_ids: Iterable[int] = (),
    ) -> None:
        size = processor.piece_size()
        is_control, is_unknown = processor.is_control, processor.is_unknown
        control = [i for i in range(size) if is_control(i) or is_unknown(i)]
        named = {processor.id_to_piece(i): i for i in control}
        self._processor = processor
        self._added_ids = dict(added_tokens or {})
        self._added = {i: token for token, i in self._added_ids.items()}
        self._splitter = SpecialTokenSplitter(named | self._added_ids)
        super().__init__(
            settings,
            vocab_size=max([size, *(i + 1 for i in self._added)]),
            special_ids=[*control, *special_ids],
            drops_leading_space=_adds_space(processor),
        )

    @classmethod
    def from_file(cls, path: Path) -> "SentencePieceTokenizer":
        """Load a tokenizer.model and the configuration files beside it."""
        try:
            model = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
        processor = load_processor(model, str(path))
        config = read_json(path.parent / "tokenizer_config.json")
        entries = config.get("added_tokens_decoder") or {}
        added = {e["content"]: int(i) for i, e in entries.items()}
        added |= read_json(path.parent / "added_tokens.json")
        # Runs of spaces are SentencePiece's own business: here the text still has plain ones.
        added = {token: i for token, i in added.items() if token.strip(f" {_SPACE}")}
        special = [int(i) for i, e in entries.items() if e.get("special")]

        def token_to_id(token: str) -> int | None:
            return added.get(token, piece_id(processor, token))

        # llama.cpp and transformers agree that SentencePiece models begin with BOS by default.
        bos = processor.bos_id()
        prefix = (bos,) if bos >= 0 and "add_bos_token" not in config else ()
        settings = read_settings(path.parent, token_to_id, prefix)
        return cls(processor, settings, added_tokens=added, special_ids=special)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary, or None."""
        return self._added_ids.get(token, piece_id(self._processor, token))

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._splitter.split(text):
            ids += [part] if isinstance(part, int) else self._processor.encode(part)
        return ids

    def _encode_marked(self, text: str) -> list[int]:
        processor, renamed = self._marked_encoder
        ids: list[int] = []
        for part in self._splitter.split(text):
            if isinstance(part, int):
                ids.append(part)
                continue
            for name, other in renamed.items():
                part = part.replace(name, other)
            ids += processor.encode(self._control_marks.restored(part))
        return ids

    @functools.cached_property
    def _marked_encoder(self) -> tuple[sentencepiece.SentencePieceProcessor, dict[str, str]]:
        """The model, in which its own symbols that are control tokens here have other names.

        SentencePiece finds its "user-defined" symbols in any text; under names that nobody knows
        it finds them where they are meant. The names are given with their new ones.
        """
        model, renamed = self._processor.serialized_model_proto(), {}
        for name, piece in self._symbols.items():
            text = name.replace(_SPACE, " ")
            if text in self._control_marks.control:
                renamed[text] = f"\uefff{secrets.token_hex(8)}"
                model = model.replace(piece, with_name(piece, name, renamed[text]))
        return (load_processor(model, "the tokenizer") if renamed else self._processor), renamed

    def _text_tokens(self) -> Collection[str]:
        added = [token for token, i in self._added_ids.items() if i not in self.special_ids]
        return {*added, *(name.replace(_SPACE, " ") for name in self._symbols)}

    @functools.cached_property
    def _symbols(self) -> dict[str, bytes]:
        """The model's own user-defined symbols; see `user_defined_pieces`."""
        return user_defined_pieces(self._processor.serialized_model_proto())

    def _piece_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        if token_id >= self._processor.piece_size():
            return b""
        piece = self._processor.id_to_piece(token_id)
        if self._processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])  # "<0x0A>"
        return piece.replace(_SPACE, " ").encode()

    def _save_vocabulary(self, directory: Path) -> None:
        (directory / "tokenizer.model").write_bytes(self._processor.serialized_model_proto())
        # The loader would prefer this one if another tokenizer had been saved here before.
        (directory / "tokenizer.json").unlink(missing_ok=True)

    def _extra_config(self) -> dict[str, object]:
        """More entries for tokenizer_config.json."""
        added = {
            str(i): {"content": token, "special": i in self.special_ids}
            for i, token in self._added.items()
        }
        return {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": added}


def load_processor(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    """Load a serialized ModelProto.

    Raises:
        CheckpointError: it is none; `name` says in the message which one.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"{name} is not a SentencePiece model: {error}") from error
    return processor


def piece_id(processor: sentencepiece.SentencePieceProcessor, token: str) -> int | None:
    """`piece_to_id`, which answers with the unknown token's id when there is no such piece."""
    token_id = processor.piece_to_id(token)
    found = 0 <= token_id < processor.piece_size() and processor.id_to_piece(token_id) == token
    return token_id if found else None


def _adds_space(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether the model's normalizer puts a space before every text."""
    return processor.normalize("a").startswith((_SPACE, " "))
