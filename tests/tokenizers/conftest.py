"""The two real tokenizers, loaded once, and a small one trained on the spot."""

import io
from pathlib import Path

import pytest
import sentencepiece

from jaxserve.tokenizers import Tokenizer, load_tokenizer
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, hello there; a tokenizer cuts text into pieces",
    "numbers 1 2 3 and words that repeat: the the the world world",
]


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return load_tokenizer(smollm2_gguf)


@pytest.fixture(scope="session")
def gemma3(gemma3_gguf: Path) -> Tokenizer:
    return load_tokenizer(gemma3_gguf)


@pytest.fixture(scope="session")
def llama_like_model() -> bytes:
    """A SentencePiece BPE model as Llama 2 has it: byte fallback, a space before the text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<|user|>"],
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def llama_like(llama_like_model: bytes, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("llama_like")
    (directory / "tokenizer.model").write_bytes(llama_like_model)
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return load_tokenizer(directory)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return ByteTokenizer()
