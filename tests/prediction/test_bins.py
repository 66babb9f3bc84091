"""Distributions over bins against lengths drawn one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.prediction.bins import LengthBins


@given(st.integers(1, 10_000), st.lists(st.integers(1, 20_000), min_size=1))
def test_every_length_is_in_its_bin(max_tokens: int, lengths: list[int]) -> None:
    bins = LengthBins(max_tokens)
    assert bins.edges[0] == 1 and bins.edges[-1] > max_tokens
    assert (np.diff(bins.edges) >= 1).all()
    for length, index in zip(lengths, bins.index(np.array(lengths)).tolist(), strict=True):
        at_end = index == len(bins) - 1
        assert bins.edges[index] <= length and (at_end or length < bins.edges[index + 1])


@given(st.integers(1, 300), st.floats(0.05, 0.95))
def test_a_sure_length_is_its_own_quantile(length: int, share: float) -> None:
    bins = LengthBins(300)
    at = bins.index(np.array([length]))[0]
    (found,) = bins.quantile(np.eye(len(bins))[at][None], share)
    assert bins.edges[at] <= found <= bins.edges[at + 1] - 1


def test_quantiles_are_those_of_many_draws() -> None:
    bins, rng = LengthBins(2000), np.random.default_rng(0)
    lengths = np.clip(np.rint(rng.lognormal(np.log(90), 0.8, 200_000)), 1, 2000)
    shares = np.bincount(bins.index(lengths), minlength=len(bins)) / len(lengths)
    for share in (0.1, 0.5, 0.9):
        (found,) = bins.quantile(shares[None], share)
        assert found == pytest.approx(np.quantile(lengths, share), rel=0.06)


def test_a_lognormal_distribution_has_its_median() -> None:
    bins = LengthBins(2000)
    shares = bins.lognormal(90, 0.8)
    assert shares.sum() == pytest.approx(1) and (shares >= 0).all()
    assert bins.quantile(shares[None])[0] == pytest.approx(90, rel=0.03)


@pytest.mark.parametrize("tokens", [0, 1, 8, 100, 5000])
def test_advancing_is_counting_down(tokens: int) -> None:
    bins, rng = LengthBins(1000), np.random.default_rng(tokens)
    shares = rng.dirichlet(np.ones(len(bins)))
    drawn = rng.choice(len(bins), 200_000, p=shares)
    low, high = bins.edges[drawn], bins.edges[drawn + 1]
    rest = rng.uniform(low, high) - tokens
    rest = rest[rest >= 1]  # the others are over
    expected = np.bincount(bins.index(np.floor(rest)), minlength=len(bins)) / len(drawn)
    assert bins.advance(tokens) @ shares == pytest.approx(expected, abs=0.005)
