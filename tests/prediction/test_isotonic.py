"""Pooling adjacent violators against the max-min formula."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.prediction.isotonic import isotonic_fit


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-20, 20)), min_size=1, max_size=15,
                unique_by=lambda pair: pair[0]))  # fmt: skip
def test_blocks_are_the_best_rising_fit(pairs: list[tuple[int, int]]) -> None:
    scores, values = np.array(pairs, float).T
    centres, means = isotonic_fit(scores, values)
    assert (np.diff(centres) > 0).all() and (np.diff(means) > 0).all()
    ordered = values[np.argsort(scores)]
    n = len(ordered)
    # The best fit at i is the largest, over starts, of the smallest mean, over ends.
    fit = [
        max(min(ordered[a : b + 1].mean() for b in range(i, n)) for a in range(i + 1))
        for i in range(n)
    ]
    assert sorted(set(np.round(fit, 9))) == pytest.approx(np.round(means, 9).tolist())


def test_one_example_is_enough() -> None:
    centres, means = isotonic_fit(np.array([2.0]), np.array([5.0]))
    assert np.interp([-9, 2, 9], centres, means).tolist() == [5, 5, 5]
