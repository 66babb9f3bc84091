"""A made-up model whose answers' lengths can be seen in its embeddings and hidden states."""

from collections.abc import Sequence

import numpy as np

from jaxserve.core.request import FinishReason, Request
from jaxserve.core.sampling_params import SamplingParams

HIDDEN = 12
VOCAB = 40  # token t asks for an answer of about 2 + 5 * t tokens
TABLE = np.random.default_rng(5).standard_normal((VOCAB, HIDDEN)).astype(np.float32)
TABLE[:, 0] = np.log(2 + 5 * np.arange(VOCAB))


def embed(token_ids: Sequence[int]) -> np.ndarray:
    return TABLE[np.asarray(token_ids)]


def hidden_state(remaining: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [1, HIDDEN], in which what remains can be seen."""
    state = rng.standard_normal(HIDDEN)
    state[:4] = 4 * np.tanh(np.log(remaining) - np.array([1, 2, 3, 4]))
    return state.astype(np.float32)[None]


def make_request(rng: np.random.Generator, max_tokens: int = 1000) -> tuple[Request, int]:
    """A request, and the length of its answer if nothing cuts it off."""
    token = int(rng.integers(VOCAB))
    request = Request(
        request_id="r", prompt_token_ids=[token] * int(rng.integers(2, 6)),
        params=SamplingParams(max_tokens=max_tokens), max_tokens=max_tokens,
    )  # fmt: skip
    return request, 2 + 5 * token


def grow(request: Request, length: int) -> None:
    request.output_token_ids = [0] * length
    request.num_tokens = len(request.prompt_token_ids) + length


def finish(request: Request, length: int, reason: FinishReason | None = None) -> None:
    """Let an answer end after so many tokens, or at `max_tokens`."""
    grow(request, min(length, request.max_tokens))
    cut = length > request.max_tokens
    request.finish_reason = reason or (FinishReason.LENGTH if cut else FinishReason.STOP)
