"""Rebuilds a tokenizer from the metadata of a GGUF file."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from jaxserve.core.errors import CheckpointError
from jaxserve.files.gguf_header import map_file, read_gguf_header
from jaxserve.tokenizers.base import Tokenizer
from jaxserve.tokenizers.huggingface import HuggingFaceTokenizer
from jaxserve.tokenizers.sentencepiece import SentencePieceTokenizer, load_processor, piece_id
from jaxserve.tokenizers.sentencepiece_proto import CONTROL, UNKNOWN, USER_DEFINED, model_proto
from jaxserve.tokenizers.settings import TokenizerSettings, with_chat_ends

# How Llama 3 and Qwen 2 cut a text into words; they differ in how many digits make one.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What templates call a token, and GGUF.
_TOKEN_KEYS = {
    "unk_token": "unknown", "sep_token": "seperator", "pad_token": "padding", "cls_token": "cls",
    "mask_token": "mask",
}  # fmt: skip


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that a GGUF file carries.

    Raises:
        CheckpointError: the file has none, or one of a kind that is not known here.
    """
    with map_file(path) as data:
        metadata = read_gguf_header(data, path).metadata
    kind = metadata.get("tokenizer.ggml.model")
    if "tokenizer.ggml.tokens" not in metadata or kind is None:
        raise CheckpointError(f"{path} carries no tokenizer")
    if kind == "gpt2":
        return _byte_level_bpe(metadata, path)
    if kind == "llama":
        return _sentencepiece(metadata, path)
    raise CheckpointError(f"{path}: unknown tokenizer.ggml.model {kind!r} (known: gpt2, llama)")


def _settings(
    metadata: dict[str, Any], token_to_id: Callable[[str], int | None], adds_bos: bool
) -> TokenizerSettings:
    """Settings from the metadata; `adds_bos` holds where it does not say."""
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    more = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    template = metadata.get("tokenizer.chat_template")
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): metadata[key] for key in metadata if key.startswith(prefix)}
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", adds_bos)
    adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    settings = TokenizerSettings(
        bos_token_id=bos,
        eos_token_ids=with_chat_ends(
            [i for i in (eos, *more) if i is not None],
            template or named.get("tool_use"),
            token_to_id,
        ),
        prefix_ids=(bos,) if adds_bos and bos is not None else (),
        suffix_ids=(eos,) if adds_eos and eos is not None else (),
        chat_template=template,
        named_templates=named,
        special_tokens=_special_tokens(metadata),
    )
    settings.check_vocabulary(len(metadata["tokenizer.ggml.tokens"]))
    return settings


def _special_tokens(metadata: dict[str, Any]) -> dict[str, str | list[str]]:
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {
        name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKEN_KEYS.items()
    }
    return {
        name: tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)
    }


def _token_types(metadata: dict[str, Any]) -> tuple[int, ...]:
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type", (1,) * len(tokens))
    if len(types) != len(tokens):
        raise CheckpointError(f"{len(tokens)} tokens, but {len(types)} token types")
    return types


def _byte_level_bpe(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """GPT-2's kind: words are cut by a regular expression, then merged from bytes."""
    tokens, types = metadata["tokenizer.ggml.tokens"], _token_types(metadata)
    pre = metadata.get("tokenizer.ggml.pre", "default")
    is_llama3 = pre in ("llama-bpe", "llama3")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(m.split(" ", 1)) for m in metadata.get("tokenizer.ggml.merges", ())]
    pre_tokenizer, normalizer = _pre_tokenizer(pre, path)
    try:
        # Llama 3 was trained with words that are whole tokens left alone.
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=is_llama3)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path}: its merges do not fit its tokens: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token
        ]
    )
    settings = _settings(metadata, vocab.get, adds_bos=is_llama3)
    around = [*settings.prefix_ids, *settings.suffix_ids]
    if around:  # so that a saved tokenizer.json is right by itself
        before = [tokens[i] for i in settings.prefix_ids]
        after = [tokens[i] for i in settings.suffix_ids]
        backend.post_processor = TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=[(tokens[i], i) for i in set(around)]
        )
    return HuggingFaceTokenizer(backend, settings)


def _pre_tokenizer(
    name: str, path: Path
) -> tuple[pre_tokenizers.PreTokenizer, normalizers.Normalizer | None]:
    """The word cutter of a `tokenizer.ggml.pre`, and the normalizer that goes with it."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("default", "gpt-2", "gpt2"):
        return gpt2, None
    if name in ("smollm", "starcoder"):
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]), None
    if name in ("llama-bpe", "llama3", "qwen2"):
        is_qwen = name == "qwen2"
        words = Regex(_WORDS.format(digits="" if is_qwen else "{1,3}"))
        split = pre_tokenizers.Split(words, behavior="isolated")
        sequence = pre_tokenizers.Sequence([split, byte_level])
        return sequence, normalizers.NFC() if is_qwen else None
    raise CheckpointError(
        f"{path}: unknown pre-tokenizer tokenizer.ggml.pre = {name!r} (known: default, gpt-2, "
        "smollm, starcoder, llama-bpe, qwen2); guessing one would tokenize wrongly"
    )


def _sentencepiece(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """SentencePiece's kind: characters are merged by the score of the result."""
    tokens, types = metadata["tokenizer.ggml.tokens"], list(_token_types(metadata))
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(f"{path}: SentencePiece tokens without a score for each")
    if UNKNOWN not in types:  # SentencePiece needs one; some files call it a control token
        types[metadata.get("tokenizer.ggml.unknown_token_id", 0)] = UNKNOWN
    adds_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    model = model_proto(
        tokens,
        types,
        scores,
        adds_space=adds_space,
        drops_spaces=bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)),
        charsmap=bytes(metadata.get("tokenizer.ggml.precompiled_charsmap", ())),
    )
    processor = load_processor(model, str(path))
    # Before a user's own token SentencePiece would put its space; llama.cpp does not.
    added = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True) if adds_space else ())
        if kind == USER_DEFINED and token.strip(" \u2581")
    }
    settings = _settings(metadata, functools.partial(piece_id, processor), adds_bos=True)
    return SentencePieceTokenizer(processor, settings, added_tokens=added)
