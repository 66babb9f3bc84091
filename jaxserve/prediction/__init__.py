"""Predictors of answer lengths by name. Those that learn need JAX; it is imported for them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxserve.core.errors import ConfigError
from jaxserve.prediction.base import LengthPredictor, NoPredictor, OraclePredictor

if TYPE_CHECKING:
    from jaxserve.prediction.network import Compile

LEARNED = ("exact", "range", "rank")
PREDICTORS = ("none", *LEARNED, "oracle")


def make_predictor(
    name: str,
    *,
    embed: Callable[[Sequence[int]], np.ndarray] | None = None,
    hidden_size: int = 0,
    max_tokens: int = 0,
    directory: Path | None = None,
    fingerprint: str = "",
    compile: "Compile | None" = None,
) -> LengthPredictor:
    """Build the predictor of that name.

    Those that learn start a thread and compile two small programs, so make them before READY.

    Args:
        name: one of PREDICTORS; those in LEARNED need the rest.
        embed: the served model's input embeddings of tokens, float32 [tokens, hidden].
        hidden_size: width of embeddings and hidden states.
        max_tokens: the longest possible answer.
        directory: where what is learned is kept; None keeps nothing.
        fingerprint: of the model; what was learned of another one is of no use.
        compile: compiles a program of some name, or fetches it from where programs are kept,
            such as `ProgramCache.get`.

    Raises:
        ConfigError: there is no such predictor, or it lacks what it needs.
    """
    if name == "none":
        return NoPredictor()
    if name == "oracle":
        return OraclePredictor()
    if name not in LEARNED:
        raise ConfigError(f"unknown length predictor {name!r}; known: {', '.join(PREDICTORS)}")
    if embed is None or hidden_size < 1 or max_tokens < 1:
        raise ConfigError(f"the length predictor {name} needs the model's embeddings and limits")
    from jaxserve.prediction.features import Features
    from jaxserve.prediction.files import state_path
    from jaxserve.prediction.predictor import LearnedPredictor

    shape = f"{fingerprint} hidden={hidden_size} max_tokens={max_tokens}"
    path = None if directory is None else state_path(directory, name, shape)
    features = Features(embed, hidden_size)
    return LearnedPredictor(
        name, features, max_tokens, path, compile or (lambda name, lower: lower().compile())
    )


__all__ = ["LEARNED", "PREDICTORS", "make_predictor"]
