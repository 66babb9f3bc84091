"""Text to token ids and back; no JAX anywhere in here."""

from jaxserve.tokenizers.base import Tokenizer, TokenizerSettings
from jaxserve.tokenizers.detokenizer import IncrementalDetokenizer
from jaxserve.tokenizers.loading import load_tokenizer

__all__ = ["IncrementalDetokenizer", "Tokenizer", "TokenizerSettings", "load_tokenizer"]
