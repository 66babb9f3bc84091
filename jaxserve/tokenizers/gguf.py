"""Rebuilds a tokenizer from the metadata of a GGUF file."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models
from tokenizers.processors import TemplateProcessing

from jaxserve.core.errors import CheckpointError
from jaxserve.files.gguf_header import map_file, read_gguf_header
from jaxserve.tokenizers.base import Tokenizer
from jaxserve.tokenizers.gguf_words import WORD_RULES
from jaxserve.tokenizers.huggingface import HuggingFaceTokenizer
from jaxserve.tokenizers.sentencepiece import SentencePieceTokenizer, load_processor, piece_id
from jaxserve.tokenizers.sentencepiece_proto import CONTROL, UNKNOWN, USER_DEFINED, model_proto
from jaxserve.tokenizers.settings import TokenizerSettings, with_chat_ends

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
    if kind in ("gpt2", "gemma4"):
        return _bpe(
            metadata,
            path,
            "gemma4" if kind == "gemma4" else metadata.get("tokenizer.ggml.pre", "default"),
        )
    if kind == "llama":
        return _sentencepiece(metadata, path)
    raise CheckpointError(
        f"{path}: unknown tokenizer.ggml.model {kind!r} (known: gpt2, gemma4, llama)"
    )


def _settings(
    metadata: dict[str, Any], token_to_id: Callable[[str], int | None], adds_bos: bool
) -> TokenizerSettings:
    """Settings from the metadata; `adds_bos` holds where it does not say."""
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    more = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    template = metadata.get("tokenizer.chat_template")
    prefix = "tokenizer.chat_template."
    named = {
        key.removeprefix(prefix): value
        for key, value in metadata.items()
        if key.startswith(prefix) and isinstance(value, str)
    }
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


def _bpe(metadata: dict[str, Any], path: Path, name: str) -> Tokenizer:
    """GPT-2's kind: words are cut by a regular expression, then merged from bytes."""
    tokens, types = metadata["tokenizer.ggml.tokens"], _token_types(metadata)
    rule = WORD_RULES.get(name) if isinstance(name, str) else None
    if rule is None:
        raise CheckpointError(
            f"{path}: unknown pre-tokenizer tokenizer.ggml.pre = {name!r} (known: "
            f"{', '.join(WORD_RULES)}); guessing one would tokenize wrongly"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [_merge(m) for m in metadata.get("tokenizer.ggml.merges", ())]
    try:
        model = models.BPE(
            vocab=vocab,
            merges=merges,
            ignore_merges=rule.ignores_merges,
            byte_fallback=not rule.is_byte_level,
        )
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path}: its merges do not fit its tokens: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = rule.pre_tokenizer()
    normalizer = rule.normalizer()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = rule.decoder()
    backend.add_tokens(
        [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token
        ]
    )
    settings = _settings(metadata, vocab.get, adds_bos=rule.adds_bos)
    around = [*settings.prefix_ids, *settings.suffix_ids]
    if around:  # so that a saved tokenizer.json is right by itself
        before = [tokens[i] for i in settings.prefix_ids]
        after = [tokens[i] for i in settings.suffix_ids]
        backend.post_processor = TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=[(tokens[i], i) for i in set(around)]
        )
    return HuggingFaceTokenizer(backend, settings)


def _merge(text: str) -> tuple[str, str]:
    """The two tokens of a merge; the first may begin with the space that is between them."""
    left, _, right = text[1:].partition(" ")
    return text[:1] + left, right


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
