"""Features: what they are worked out naively, and that their size is bounded."""

import numpy as np
import pytest

from jaxserve.prediction.features import MAX_WIDTH, PROMPT_ENDS, Features

TABLE = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)


def test_a_prompts_mean_deviation_and_length() -> None:
    features = Features(lambda ids: TABLE[np.asarray(ids)], 6)
    ids = [3, 7, 7, 20]
    vector = features.prompt(ids)
    assert vector.shape == (features.prompt_size,) and vector.dtype == np.float32
    rows = TABLE[ids]
    expected = [*rows.mean(axis=0), *rows.std(axis=0), np.log(4)]
    assert vector == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert np.isfinite(features.prompt([5])).all()


def test_of_a_long_prompt_only_the_ends_are_looked_up() -> None:
    asked: list[int] = []

    def embed(ids):
        asked.extend(ids)
        return TABLE[np.asarray(ids) % 50]

    vector = Features(embed, 6).prompt(list(range(1000)))
    assert asked == [*range(PROMPT_ENDS), *range(1000 - PROMPT_ENDS, 1000)]
    assert vector[-1] == pytest.approx(np.log(1000))


def test_hidden_states_lose_their_size_and_gain_their_position() -> None:
    features = Features(lambda ids: TABLE[np.asarray(ids)], 6)
    hidden = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)
    positions = np.array([1, 9, 17])
    rows = features.hidden(hidden, positions)
    assert rows.shape == (3, features.hidden_size) and rows.dtype == np.float32
    assert np.square(rows[:, :6]).mean(axis=1) == pytest.approx([1, 1, 1], rel=1e-4)
    assert rows == pytest.approx(features.hidden(7 * hidden, positions), rel=1e-4)
    assert rows[:, 6] == pytest.approx(np.log(positions))


def test_wide_models_are_folded_and_nearly_keep_inner_products() -> None:
    width = 2 * MAX_WIDTH + 100
    features = Features(lambda ids: np.zeros((len(ids), width), np.float32), width)
    assert features.hidden_size == MAX_WIDTH + 2
    rng = np.random.default_rng(2)
    base = rng.standard_normal(width)
    alike, other = base + 0.3 * rng.standard_normal(width), rng.standard_normal(width)
    rows = np.array([base, alike, other], np.float32)
    folded = features.hidden(rows, np.array([1, 1, 1]))[:, :MAX_WIDTH] / MAX_WIDTH**0.5
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert folded @ folded.T == pytest.approx(rows @ rows.T, abs=0.15)
