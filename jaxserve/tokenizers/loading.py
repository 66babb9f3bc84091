"""Finds out which kind of tokenizer a path holds."""

from pathlib import Path

from jaxserve.core.errors import CheckpointError, JaxserveError
from jaxserve.tokenizers.base import Tokenizer
from jaxserve.tokenizers.gguf import load_gguf_tokenizer
from jaxserve.tokenizers.huggingface import HuggingFaceTokenizer
from jaxserve.tokenizers.sentencepiece import SentencePieceTokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a directory or file.

    Args:
        path: a directory with tokenizer.json (preferred) or tokenizer.model, a GGUF file, or
            one of those two files themselves; tokenizer_config.json, generation_config.json
            and chat_template.jinja are read from beside it.

    Raises:
        CheckpointError: nothing there is a tokenizer, or it is corrupt or unsupported.
    """
    try:
        return _load(path)
    except JaxserveError:
        raise
    except Exception as error:  # a file may hold anything, and the libraries raise every kind
        raise CheckpointError(
            f"{path} holds no sound tokenizer: {type(error).__name__}: {str(error)[:500]}"
        ) from error


def _load(path: Path) -> Tokenizer:
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return _load(path / name)
        raise CheckpointError(f"{path} holds neither tokenizer.json nor tokenizer.model")
    if not path.is_file():
        raise CheckpointError(f"there is no tokenizer at {path}")
    if path.suffix == ".gguf":
        return load_gguf_tokenizer(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer.from_file(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer.from_file(path)
    raise CheckpointError(f"{path} is not a .gguf, .json or .model file")
