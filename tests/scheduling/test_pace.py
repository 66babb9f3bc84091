"""How fast steps are, by hand."""

import pytest

from jaxserve.scheduling.pace import Pace


def paced(*steps: tuple[int, float]) -> Pace:
    """What is known after steps of so many tokens, planned at such times."""
    pace = Pace()
    for num_tokens, now in steps:
        pace.step(num_tokens, now)
    return pace


def test_nothing_is_assumed_until_a_step_has_ended() -> None:
    assert paced().seconds_for(1000) == paced((100, 5.0)).seconds_for(1000) == 0.0


def test_a_full_step_says_what_a_token_takes_and_a_small_one_does_not() -> None:
    assert paced((100, 5.0), (1, 7.0)).seconds_for(300) == pytest.approx(6.0)
    small = paced((Pace.MIN_TOKENS - 1, 5.0), (1, 7.0))
    assert small.seconds_per_token == 0.0 and small.seconds_for(300) == 2.0
    assert paced((100, 5.0), (1, 7.0)).seconds_for(1) == 2.0  # a step is a step


def test_plans_at_one_time_are_one_step() -> None:
    assert paced((50, 5.0), (50, 5.0), (1, 7.0)).seconds_per_token == pytest.approx(0.02)


def test_what_was_faster_is_believed_sooner_than_what_was_slower() -> None:
    known = [(100, 0.0), (100, 2.0)]
    faster, slower = paced(*known, (1, 3.0)), paced(*known, (1, 5.0))
    assert faster.seconds_per_step == pytest.approx(2.0 - 0.3 * 1.0)
    assert slower.seconds_per_step == pytest.approx(2.0 + 0.05 * 1.0)


def test_idle_time_is_no_step() -> None:
    pace = paced((100, 0.0), (100, 2.0))
    pace.idle()
    pace.step(100, 3600.0)
    assert pace.seconds_per_step == 2.0
