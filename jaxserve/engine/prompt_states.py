"""What is made of the hidden states of a prompt's tokens, chunk by chunk, so that none is kept."""

import abc
from collections.abc import Callable, Sequence

import numpy as np

from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.engine.outputs import Embedding

Score = Callable[[np.ndarray, Sequence[int], int], list[TokenLogprobs]]  # see `Executor.score`


class PromptStates(abc.ABC):
    """Takes in the states of a prompt's tokens in order, each once.

    A request that was preempted computes its prompt again; what has been seen is passed over.

    Args:
        prompt: its token ids.
        num_wanted: how many states, from the first on, are wanted.
    """

    def __init__(self, prompt: Sequence[int], num_wanted: int) -> None:
        self.prompt = prompt
        self._num_wanted = num_wanted
        self._num_taken = 0

    @property
    def is_complete(self) -> bool:
        """Whether all states that are wanted have been seen."""
        return self._num_taken >= self._num_wanted

    def take(self, start: int, hidden: np.ndarray) -> None:
        """Take in the states of the tokens from position `start` on, float32 [tokens, hidden]."""
        assert start <= self._num_taken, "a prompt's tokens are computed in order"
        new = hidden[self._num_taken - start : self._num_wanted - start]
        if len(new):
            self._take(self._num_taken, new)
            self._num_taken += len(new)

    @abc.abstractmethod
    def _take(self, start: int, hidden: np.ndarray) -> None:
        """Take in states that are new, of the tokens from position `start` on."""


class PromptScorer(PromptStates):
    """Log-probabilities of a prompt's tokens, from the second on.

    Args:
        prompt: its token ids.
        num_top: how many of the most likely tokens to tell at each position.
        score: what knows them.

    Attributes:
        logprobs: one per token so far.
    """

    def __init__(self, prompt: Sequence[int], num_top: int, score: Score) -> None:
        super().__init__(prompt, len(prompt) - 1)  # what follows the last token is no prompt
        self.logprobs: list[TokenLogprobs] = []
        self._num_top = num_top
        self._score = score

    def _take(self, start: int, hidden: np.ndarray) -> None:
        following = self.prompt[start + 1 : start + 1 + len(hidden)]
        self.logprobs += self._score(hidden, following, self._num_top)


class PromptPooler(PromptStates):
    """One vector for a whole prompt.

    Args:
        prompt: its token ids.
        pooling: `mean` of all tokens' states, or the `last` token's.
    """

    def __init__(self, prompt: Sequence[int], pooling: str) -> None:
        super().__init__(prompt, len(prompt))
        self._is_mean = pooling == "mean"
        self._sum: np.ndarray | None = None  # float64 [hidden]

    def _take(self, start: int, hidden: np.ndarray) -> None:
        if not self._is_mean:
            self._sum = hidden[-1].astype(np.float64)
            return
        total = hidden.sum(axis=0, dtype=np.float64)
        self._sum = total if self._sum is None else self._sum + total

    def embedding(self) -> Embedding:
        """The vector; all states have been seen."""
        assert self._sum is not None and self.is_complete
        # A mean and a sum have the same direction; the length is 1 either way.
        length = float(np.linalg.norm(self._sum))
        values = self._sum / length if length else self._sum
        return Embedding(values.astype(np.float32), len(self.prompt))
