"""Buckets chosen by dynamic programming, against trying them all."""

import itertools
import random
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.errors import ConfigError
from jaxserve.runner import bucket_choice
from jaxserve.runner.bucket_choice import (
    Cost,
    choose_buckets,
    expected_cost,
    padding_fraction,
    steps_per_bucket,
)
from jaxserve.runner.buckets import Buckets, doubling_buckets, parse_buckets, pick

LIMIT = 12
COUNTS = st.dictionaries(st.integers(0, LIMIT), st.integers(0, 50), max_size=9)


def dumb_cost(counts: dict[int, int], buckets: tuple[int, ...], cost: Cost = float) -> float:
    """Step by step."""
    steps = [size for size, count in counts.items() if size for _ in range(count)]
    return sum(cost(pick(buckets, size)) for size in steps) / max(1, len(steps))


@settings(max_examples=150)
@given(COUNTS, st.integers(1, 5), st.lists(st.integers(0, 9), min_size=LIMIT, max_size=LIMIT))
def test_no_other_buckets_cost_less(counts: dict[int, int], k: int, rises: list[int]):
    def cost(size: int) -> float:  # never falls, as of any device
        return float(sum(rises[:size]))

    chosen = choose_buckets(counts, limit=LIMIT, num_programs=k, cost=cost)
    assert chosen[-1] == LIMIT and len(chosen) <= k and sorted(set(chosen)) == list(chosen)
    others = (
        (*sizes, LIMIT) for n in range(k) for sizes in itertools.combinations(range(1, LIMIT), n)
    )
    least = min(dumb_cost(counts, buckets, cost) for buckets in others)
    assert dumb_cost(counts, chosen, cost) == pytest.approx(least)
    assert expected_cost(counts, chosen, cost) == pytest.approx(least)


@settings(max_examples=50)
@given(COUNTS, st.integers(1, 5))
def test_padding_is_what_the_smallest_fitting_bucket_leaves_empty(counts: dict[int, int], k: int):
    buckets = choose_buckets(counts, limit=LIMIT, num_programs=k)
    steps = [size for size, count in counts.items() if size for _ in range(count)]
    run = sum(pick(buckets, size) for size in steps)
    assert padding_fraction(counts, buckets) == pytest.approx(1 - sum(steps) / run if run else 0)
    assert sum(steps_per_bucket(counts, buckets).values()) == len(steps)


def test_as_many_programs_as_sizes_pad_nothing_and_use_no_more():
    counts = {3: 5, 17: 1, 40: 2}
    assert choose_buckets(counts, limit=40, num_programs=10) == (3, 17, 40)
    assert padding_fraction(counts, (3, 17, 40)) == 0
    assert choose_buckets(counts, limit=64, num_programs=1) == (64,)
    assert choose_buckets({}, limit=64, num_programs=4) == (64,)


def test_sizes_that_cost_the_same_share_a_program():
    def cost(size: int) -> float:
        return float(max(size, 8))  # as on a device that waits for its weights

    chosen = choose_buckets({1: 9, 2: 9, 7: 1, 30: 1}, limit=32, num_programs=4, cost=cost)
    assert expected_cost({1: 9, 2: 9, 7: 1, 30: 1}, chosen, cost) == (19 * 8 + 30) / 20
    assert len(chosen) == 3


def test_many_sizes_are_thinned_and_hardly_worse(monkeypatch: pytest.MonkeyPatch):
    rng = random.Random(1)
    counts = {size: rng.randint(1, 1000) for size in range(1, 400)}
    best = expected_cost(counts, choose_buckets(counts, limit=400, num_programs=6))
    monkeypatch.setattr(bucket_choice, "MAX_CANDIDATES", 50)
    thinned = expected_cost(counts, choose_buckets(counts, limit=400, num_programs=6))
    assert best <= thinned < 1.02 * best
    assert best < expected_cost(counts, doubling_buckets(400))  # which are two programs more


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="13 exceeds"):
        choose_buckets({13: 1}, limit=12, num_programs=2)
    with pytest.raises(ValueError, match="at least one"):
        choose_buckets({1: 1}, limit=12, num_programs=0)
    with pytest.raises(ValueError, match="13 exceeds"):
        padding_fraction({13: 1}, (4, 12))


# ------------------------------------------------------------------- buckets by option


def test_options_are_read(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="jaxserve")
    assert parse_buckets(None, option="--token-buckets", limit=64) is None
    assert parse_buckets("1,8, 24,64", option="--token-buckets", limit=64) == (1, 8, 24, 64)
    assert not caplog.messages
    assert parse_buckets("2,8", option="--row-buckets", limit=16, num_shards=2) == (1, 4, 8)
    assert caplog.messages == ["--row-buckets: added 16, the largest step there can be"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "whole numbers"), ("1,,2", "whole numbers"), ("1,x", "'1,x'"), ("1.5", "whole"),
        ("0,8", "positive"), ("8,4", "ascending"), ("4,4", "ascending"), ("-2,64", "positive"),
        ("1,65", "65 is more than a step can have, 64"), ("2,7", "7 must divide by .* data=2"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_buckets(text, option="--token-buckets", limit=64, num_shards=2)


def test_chosen_buckets_take_the_place_of_doubling_ones():
    make = partial(Buckets.for_limits, max_tokens=64, max_rows=8, max_model_len=100, page_size=16)
    chosen = make(tokens=(3, 64))
    assert chosen.tokens == (3, 64) and chosen.sampled == doubling_buckets(8)
    assert make(sampled=(5, 8)).sampled == (5, 8)
    assert chosen.rows(3) == 3 and chosen.rows(64) == 8
    with pytest.raises(ConfigError, match="largest row bucket is 9, steps have 8"):
        make(sampled=(5, 9))


def test_costs_may_be_of_any_shape():
    """A bucket larger than needed may be cheaper; only observed sizes and the limit are tried."""
    table = np.array([0, 5, 4, 9, 2])
    chosen = choose_buckets({1: 1, 2: 1, 3: 1}, limit=4, num_programs=3, cost=lambda n: table[n])
    assert chosen == (4,)


@pytest.mark.parametrize(
    ("sampled", "late"),
    [
        ((1,), (1,)),
        ((1, 2), (2,)),
        ((1, 4), (1, 4)),
        ((1, 8, 16, 32, 64), (1, 16, 64)),
        ((3, 5, 17, 50, 65, 256), (5, 50, 256)),
    ],
)
def test_late_steps_have_fewer_buckets(sampled: tuple[int, ...], late: tuple[int, ...]):
    """Every step fits, and none is padded by more than a bucket left out would have."""
    chosen = Buckets.for_limits(
        max_tokens=300, max_rows=sampled[-1], max_model_len=64, page_size=4, sampled=sampled
    )
    assert chosen.late == late
