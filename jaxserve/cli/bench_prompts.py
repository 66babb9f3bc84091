"""Where benchmarks of answer lengths get their prompts from."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.core.config import EngineConfig

if TYPE_CHECKING:
    from jaxserve.bench.prompts import ChatPrompt


def tokenize_prompts(config: EngineConfig, prompts: "Iterable[ChatPrompt]") -> list[list[int]]:
    """Token ids of prompts as the chat template of the config's model renders them.

    Raises:
        JaxserveError: the model has no tokenizer, or no template.
    """
    from jaxserve.checkpoints.load import open_checkpoint
    from jaxserve.checkpoints.pull import resolve_model
    from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer
    from jaxserve.tokenizers.loading import load_tokenizer

    if config.tokenizer is not None:
        tokenizer = load_tokenizer(Path(config.tokenizer))
    elif config.random_weights:
        tokenizer = ByteTokenizer()
    else:
        tokenizer = load_tokenizer(open_checkpoint(resolve_model(config.model)).tokenizer_path)
    return [tokenizer.apply_chat_template(prompt.messages) for prompt in prompts]
