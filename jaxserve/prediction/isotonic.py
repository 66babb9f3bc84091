"""Isotonic regression: the best fit that never falls."""

import numpy as np


def isotonic_fit(scores: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares among non-decreasing functions, by pooling adjacent violators.

    Args:
        scores: float [n], at least one.
        values: float [n], what should grow with the score.

    Returns:
        Mean score and mean value of every block, both ascending, for `np.interp`: between the
        blocks it keeps apart the scores that a step function would make equal.
    """
    order = np.argsort(scores, kind="stable")
    blocks: list[tuple[float, float, int]] = []  # sums of values and scores, and how many
    for score, value in zip(scores[order].tolist(), values[order].tolist(), strict=True):
        block = (value, score, 1)
        while blocks and blocks[-1][0] * block[2] >= block[0] * blocks[-1][2]:
            last = blocks.pop()
            block = (last[0] + block[0], last[1] + block[1], last[2] + block[2])
        blocks.append(block)
    value_sums, score_sums, counts = np.array(blocks, np.float64).T
    return score_sums / counts, value_sums / counts
