"""The three losses: what they want, and what an answer that was cut off tells them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.prediction.losses import OBJECTIVES, Labels, exact_loss, range_loss, rank_loss


def labels(lengths: list[float], censored: list[bool], bins: list[int] | None = None) -> Labels:
    return Labels(
        jnp.log(jnp.array(lengths)),
        jnp.array(bins or [0] * len(lengths), jnp.int32),
        jnp.array(censored),
    )


def column(*values: float) -> jax.Array:
    return jnp.array(values, jnp.float32)[:, None]


def test_regression_forgives_exceeding_a_lower_bound_only() -> None:
    known, cut = labels([10], [False]), labels([10], [True])
    over, under = column(np.log(10) + 0.5), column(np.log(10) - 0.5)
    assert float(exact_loss(over, known)) == pytest.approx(0.125)
    assert float(exact_loss(under, known)) == pytest.approx(0.125)
    assert float(exact_loss(over, cut)) == 0
    assert float(exact_loss(under, cut)) == pytest.approx(0.125)


def test_classes_from_a_lower_bound_up_are_all_right() -> None:
    logits = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]]))
    at = [2]
    assert float(range_loss(logits, labels([9], [False], at))) == pytest.approx(-np.log(0.3))
    assert float(range_loss(logits, labels([9], [True], at))) == pytest.approx(-np.log(0.7))


@pytest.mark.parametrize(
    ("lengths", "censored", "known"),
    [
        ([3, 8], [False, False], True),
        ([3, 8], [False, True], True),  # 8 or more is longer still
        ([3, 8], [True, False], False),  # 3 or more may be 9
        ([8, 8], [False, True], True),  # 8 is not longer than 8 or more
        ([8, 8], [False, False], False),
        ([8, 8], [True, True], False),
    ],
)
def test_only_pairs_of_known_order_are_ranked(
    lengths: list[float], censored: list[bool], known: bool
) -> None:
    right = float(rank_loss(column(0, 1), labels(lengths, censored)))
    wrong = float(rank_loss(column(1, 0), labels(lengths, censored)))
    if known:
        assert right == pytest.approx(np.log1p(np.exp(-1)))
        assert wrong == pytest.approx(np.log1p(np.exp(1)))
    else:
        assert right == wrong == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_finite_even_far_off(name: str) -> None:
    objective = OBJECTIVES[name]
    outputs = jnp.array([[300.0] * 5, [-300.0] * 5]) if objective.per_bin else column(300, -300)
    some = labels([1, 4000], [True, False], [0, 4])
    assert bool(jnp.isfinite(jax.grad(lambda x: objective.loss(x, some))(outputs)).all())
