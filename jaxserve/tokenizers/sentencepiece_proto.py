"""Models of SentencePiece as bytes: made from parts, and changed in one."""

import functools
import itertools
import struct

# Kinds of pieces, numbered as in ModelProto and in GGUF's `tokenizer.ggml.token_type`.
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6


def model_proto(
    tokens: list[str],
    types: list[int],
    scores: tuple[float, ...],
    *,
    adds_space: bool,
    drops_spaces: bool,
    charsmap: bytes,
) -> bytes:
    """A SentencePiece ModelProto (BPE) in protocol buffer wire format.

    Written by hand: it is faster than 262,144 message objects, and the generated code that
    comes with sentencepiece accepts only the newest protobuf. Field numbers:
    https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto

    Args:
        tokens: the pieces' names.
        types: the kind of each.
        scores: of each; of two that could be merged the greater goes first.
        adds_space: the model puts a space before a text.
        drops_spaces: it takes spaces at both ends away, and makes one of several.
        charsmap: its normalization, as SentencePiece has it compiled; empty for none.
    """
    kinds = {kind: _number(3, kind) for kind in set(types)}
    pieces = []
    packed_scores = struct.iter_unpack("4s", struct.pack(f"<{len(scores)}f", *scores))
    for token, kind, (score,) in zip(tokens, types, packed_scores, strict=True):
        # GGUF has user-defined tokens as plain text, SentencePiece with its mark for spaces.
        text = token.replace(" ", "\u2581") if kind == USER_DEFINED else token
        pieces.append(_message(1, _message(1, text.encode()) + b"\x15" + score + kinds[kind]))
    bytes_known = types.count(BYTE) == 256
    bpe = 2
    trainer = _number(3, bpe) + _number(4, len(tokens)) + _number(35, bytes_known)
    normalizer = (
        _message(1, b"identity")
        + (_message(2, charsmap) if charsmap else b"")
        + _number(3, adds_space)
        + _number(4, drops_spaces)
        + _number(5, True)  # spaces become U+2581
    )
    return b"".join(itertools.chain(pieces, [_message(2, trainer), _message(3, normalizer)]))


def user_defined_pieces(model: bytes) -> dict[str, bytes]:
    """The user-defined pieces of a serialized ModelProto: names, and the parts that define them.

    Args:
        model: as the library serializes it: pieces first, fields in the order of their numbers.
    """
    found: dict[str, bytes] = {}
    tag, kind = _number(3, USER_DEFINED)
    position, length = 0, len(model)
    while position < length and model[position] == 0x0A:  # a piece
        size, start = model[position + 1], position + 2
        if size > 0x7F:
            size, start = _read_varint(model, position + 1)
        end = start + size
        if model[end - 1] == kind and model[end - 2] == tag:
            size, name = _read_varint(model, start + 1)
            found[model[name : name + size].decode()] = model[position:end]
        position = end
    return found


def with_name(piece: bytes, name: str, other: str) -> bytes:
    """A user-defined piece (see `user_defined_pieces`) of a name under another one."""
    own = _message(1, name.encode())
    return _message(1, _message(1, other.encode()) + piece[piece.index(own) + len(own) :])


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


@functools.cache  # tags and lengths: few different ones, most of the time goes here
def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the high bit says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content
