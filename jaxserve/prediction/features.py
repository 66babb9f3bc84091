"""What a predictor sees of a prompt and of an answer under way."""

import math
from collections.abc import Callable, Sequence

import numpy as np

Embed = Callable[[Sequence[int]], np.ndarray]

PROMPT_ENDS = 64  # tokens looked at from each end of a prompt: the time does not grow with it
MAX_WIDTH = 1024


class Features:
    """Turns prompts and hidden states into vectors of fixed size.

    A prompt becomes the mean and the standard deviation of its tokens' input embeddings, which
    the served model has anyway, as in TRAIL (Shahout et al., 2024), and the logarithm of its
    length. The deviation made ridge regression on 700 answers of SmolLM2 a little better (Kendall's
    tau 0.654, not 0.644); maxima, halves and the last tokens beside them did not. Vectors wider
    than `MAX_WIDTH` are folded with random signs (feature hashing, Weinberger et al., 2009),
    which nearly keeps inner products.

    Args:
        embed: input embeddings of tokens, float32 [tokens, hidden].
        hidden_size: width of embeddings and hidden states.
    """

    def __init__(self, embed: Embed, hidden_size: int) -> None:
        self._embed = embed
        self._width = min(hidden_size, MAX_WIDTH)
        self._padding = -hidden_size % self._width
        signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), hidden_size)
        self._signs = signs if hidden_size > MAX_WIDTH else None

    @property
    def prompt_size(self) -> int:
        """Length of `prompt`'s vectors."""
        return 2 * self._width + 1

    @property
    def hidden_size(self) -> int:
        """Length of the rows of `hidden`."""
        return self._width + 2

    def prompt(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [prompt_size] of at least one token."""
        seen = token_ids
        if len(seen) > 2 * PROMPT_ENDS:
            seen = [*token_ids[:PROMPT_ENDS], *token_ids[-PROMPT_ENDS:]]
        rows = self._fold(self._embed(seen))
        mean = rows.mean(axis=0)
        square = np.einsum("tw,tw->w", rows, rows) / len(rows)
        deviation = np.sqrt(np.maximum(square - mean * mean, 0))
        return np.concatenate([mean, deviation, [math.log(len(token_ids))]], dtype=np.float32)

    def hidden(self, hidden: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Features of answers under way.

        Args:
            hidden: float32 [rows, hidden], last hidden states, not normed.
            positions: int [rows], answer tokens so far.

        Returns:
            float32 [rows, hidden_size].
        """
        rows = self._fold(hidden)
        size = np.sqrt(np.einsum("rw,rw->r", rows, rows) / self._width + 1e-12)
        logs = np.log(positions)
        extra = np.stack([logs, logs * logs], axis=1)
        return np.concatenate([rows / size[:, None], extra], axis=1, dtype=np.float32)

    def _fold(self, rows: np.ndarray) -> np.ndarray:
        if self._signs is None:
            return rows
        padded = np.pad(rows * self._signs, ((0, 0), (0, self._padding)))
        return padded.reshape(len(rows), -1, self._width).sum(axis=1)
