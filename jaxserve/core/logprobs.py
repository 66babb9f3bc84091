"""How likely the model thought a token, and which ones it thought more likely."""

from typing import NamedTuple


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position, of the model's own distribution.

    That is softmax(logits) in float32, before temperature, penalties, biases and grammars, as
    vLLM's `raw_logprobs`.

    Attributes:
        token_id: the token that stands at the position.
        logprob: its natural logarithm of probability.
        rank: how many tokens are at least as likely, itself included: 1 for the most likely.
        top_ids: the most likely tokens, most likely first; as many as were asked for.
        top_logprobs: theirs.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
