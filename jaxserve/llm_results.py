"""What `LLM` returns: the classes and fields that vLLM's users know."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.engine.outputs import TokenDelta


class Logprob(NamedTuple):
    """How likely the model thought a token, before anything shaped its choice.

    Attributes:
        logprob: the natural logarithm of its probability.
        rank: 1 for the most likely token.
        decoded_token: its text.
    """

    logprob: float
    rank: int
    decoded_token: str


Logprobs = dict[int, Logprob]  # at one position: of the token that stands there, and the likeliest


@dataclasses.dataclass
class CompletionOutput:
    """One answer to a prompt.

    Attributes:
        index: which of the prompt's answers it is.
        text, token_ids: the answer.
        finish_reason: `stop`, `length`, `abort`, `shed` or `error`; None until it is finished.
        stop_reason: the stop string or token that ended it, if one did.
        logprobs: one entry per token, if they were asked for.
        cumulative_logprob: their sum over the answer's tokens.
        error: why it could not go on, if `finish_reason` is `error`.
    """

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[Logprobs] | None = None
    cumulative_logprob: float | None = None
    error: str | None = None


@dataclasses.dataclass
class RequestOutput:
    """A prompt and its answers.

    Attributes:
        request_id: of the prompt.
        prompt, prompt_token_ids: the prompt; its text is None if it was given as tokens.
        outputs: the answers, by index.
        finished: whether all answers are.
        prompt_logprobs: one entry per token, if they were asked for; None for the first, which
            nothing foretells.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[Logprobs | None] | None = None


@dataclasses.dataclass
class EmbeddingOutput:
    """A text as one vector: `embedding`, float32 [hidden], of length 1 (Euclidean)."""

    embedding: np.ndarray


@dataclasses.dataclass
class EmbeddingRequestOutput:
    """A text and its embedding."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput


def append(
    result: RequestOutput, index: int, delta: TokenDelta, decode: Callable[[int], str]
) -> None:
    """Add a delta to one of a prompt's answers.

    Args:
        result: the prompt and its answers.
        index: which answer.
        delta: what comes next of it.
        decode: the text of a token.
    """
    output = result.outputs[index]
    output.text += delta.text
    output.token_ids.extend(delta.token_ids)
    if delta.logprobs:
        output.logprobs = output.logprobs or []
        output.logprobs += [_by_token(at, decode) for at in delta.logprobs]
        total = sum(at.logprob for at in delta.logprobs)
        output.cumulative_logprob = (output.cumulative_logprob or 0.0) + total
    if delta.prompt_logprobs is not None:
        result.prompt_logprobs = [None, *(_by_token(at, decode) for at in delta.prompt_logprobs)]
    if delta.finish_reason is not None:
        output.finish_reason = delta.finish_reason.value
        output.stop_reason = delta.stop_reason
        output.error = None if delta.error is None else str(delta.error)
        result.finished = all(output.finish_reason is not None for output in result.outputs)


def _by_token(at: TokenLogprobs, decode: Callable[[int], str]) -> Logprobs:
    top: Sequence[tuple[int, float]] = tuple(zip(at.top_ids, at.top_logprobs, strict=True))
    found = {at.token_id: Logprob(at.logprob, at.rank, decode(at.token_id))}
    for rank, (token, logprob) in enumerate(top, start=1):
        if token != at.token_id:
            found[token] = Logprob(logprob, rank, decode(token))
    return found
