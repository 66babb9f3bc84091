"""Budgets of steps: fixed, or found by how long steps take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.scheduling.token_budget import FixedBudget, TpotBudget

SIZES = (1, 8, 16, 32, 64, 128)


def serve(budget: TpotBudget, seconds_of: dict[int, float], steps: int = 40) -> int:
    """Full steps of a machine that takes `seconds_of[size]` for each; the budget in the end."""
    for _ in range(steps):
        num_tokens = budget.tokens(0)
        size = next(size for size in SIZES if size >= num_tokens)
        budget.observe(num_tokens, seconds_of[size])
    return budget.tokens(0)


def test_a_fixed_budget_learns_nothing() -> None:
    budget = FixedBudget(77)
    budget.observe(77, 100.0)
    assert budget.tokens(0) == budget.tokens(500) == 77


@pytest.mark.parametrize(("target", "expected"), [(0.5, 128), (0.1, 64), (0.06, 32), (0.035, 8)])
def test_the_budget_grows_to_the_largest_size_that_meets_the_target(
    target: float, expected: int
) -> None:
    seconds = {size: 0.02 + 0.001 * size for size in SIZES}
    assert serve(TpotBudget(target, SIZES), seconds) == expected


def test_the_budget_follows_a_machine_that_slows_down() -> None:
    budget = TpotBudget(0.1, SIZES)
    assert serve(budget, {size: 0.001 * size for size in SIZES}) == 64
    for _ in range(60):
        budget.observe(64, 0.15)
    assert budget.tokens(0) == 32


def test_one_step_that_was_held_up_changes_nothing() -> None:
    budget = TpotBudget(0.1, SIZES)
    before = serve(budget, {size: 0.001 * size for size in SIZES})
    budget.observe(64, 30.0)
    assert budget.tokens(0) == before


@given(
    st.lists(st.tuples(st.integers(1, 128), st.floats(1e-4, 10.0)), max_size=50),
    st.integers(0, 300),
)
def test_every_running_request_gets_a_token_and_prompts_a_few(
    steps: list[tuple[int, float]], num_running: int
) -> None:
    budget = TpotBudget(1e-3, SIZES)
    for num_tokens, seconds in steps:
        budget.observe(num_tokens, seconds)
    assert min(num_running + 8, 128) <= budget.tokens(num_running) <= 128
