"""Linear layers: every implementation against float64, shapes at all borders of the CPU's tiles."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels.linear import choose_implementation, linear
from pallas_kernels.linear.cpu import MOST_TOKENS

CPU = SimpleNamespace(platform="cpu")


def error(out: Any, expected: np.ndarray) -> float:
    """||out - expected|| / ||expected||."""
    return float(np.linalg.norm(np.asarray(out) - expected) / np.linalg.norm(expected))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("implementation", ["cpu", "xla", "reference"])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [((3, 5, 8), (37,)), ((41,), (2, 3, 16)), ((2, 53), (64,))]
)
@pytest.mark.parametrize("tokens", [1, 7, 16, 67, MOST_TOKENS + 1])
def test_axes(
    implementation: str, outputs: tuple[int, ...], inputs: tuple[int, ...], tokens: int
) -> None:
    x, weight = draw(tokens, *inputs), draw(*outputs, *inputs, seed=1)
    out = jax.jit(lambda x, w: linear(x, w, implementation=implementation))(x, weight)
    axes = (range(1, x.ndim), range(len(outputs), weight.ndim))
    expected = np.tensordot(x.astype(np.float64), weight.astype(np.float64), axes)
    assert out.shape == expected.shape
    assert error(out, expected) < 1e-6


@settings(max_examples=60)
@given(
    tokens=st.integers(1, MOST_TOKENS),
    outputs=st.integers(1, 150),
    width=st.integers(1, 130),
    seed=st.integers(0, 99),
)
@example(tokens=17, outputs=13, width=4099, seed=0)  # tokens, rows and width next to a tile's
@example(tokens=131, outputs=97, width=4099, seed=0)  # more activations than a block takes
def test_cpu_at_any_size(tokens: int, outputs: int, width: int, seed: int) -> None:
    """Neighbours make and use what the kernel reads and writes, in layouts of their own."""
    x, weight = draw(tokens, width, seed=seed), draw(outputs, width, seed=seed + 1)
    out = jax.jit(lambda x, w: linear(2 * x, w, implementation="cpu") + 1)(x, weight)
    expected = 2 * x.astype(np.float64) @ weight.T.astype(np.float64) + 1
    assert error(out, expected) < 3e-6


@pytest.mark.parametrize("padded", [13, 40])
def test_padding_is_left_out(padded: int) -> None:
    """In both layouts of activations, whatever the rows behind hold."""
    x, weight = draw(padded, 37), jnp.asarray(draw(53, 37, seed=1))
    call = jax.jit(lambda x, n: linear(x, weight, implementation="cpu", num_tokens=n))
    whole = np.asarray(call(x, padded))
    assert error(whole, x.astype(np.float64) @ np.asarray(weight.T, np.float64)) < 1e-6
    for count in (0, 1, 7, padded):
        x[count:] = np.nan
        out = np.asarray(call(x, count))
        np.testing.assert_allclose(out[:count], whole[:count], rtol=1e-5, atol=1e-5)
        assert not out[count:].any()
        x = draw(padded, 37)


def test_calls_of_several_programs_at_once() -> None:
    """A chain of products, so that threads wait for the next one, in more programs than cores."""
    weights = [draw(61, 61, seed=i) / 8 for i in range(30)]
    expected = {tokens: draw(tokens, 61).astype(np.float64) for tokens in (1, 19)}
    for weight in weights:
        expected = {tokens: x @ weight.T for tokens, x in expected.items()}

    @jax.jit
    def chain(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        for weight in weights:
            x = linear(x, weight, implementation="cpu")
        return x

    def check(index: int) -> None:
        tokens = (1, 19)[index % 2]
        assert error(chain(draw(tokens, 61), weights), expected[tokens]) < 1e-5

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, range(200)))


def test_choice() -> None:
    assert choose_implementation("auto", CPU, jnp.float32) == "cpu"
    assert choose_implementation("auto", CPU, jnp.bfloat16) == "xla"
    assert choose_implementation("auto", SimpleNamespace(platform="tpu"), jnp.float32) == "xla"
    assert choose_implementation("xla", CPU, jnp.float32) == "xla"


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "reason"),
    [
        ("cpu", "gpu", jnp.float32, "takes a CPU, and this is gpu; use 'auto'"),
        ("cpu", "cpu", jnp.bfloat16, "takes float32, not bfloat16"),
        ("fast", "cpu", jnp.float32, "no linear 'fast'; there are auto, cpu"),
    ],
)
def test_what_cannot_run_is_refused(name: str, platform: str, dtype: type, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        choose_implementation(name, SimpleNamespace(platform=platform), dtype)


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="takes float32, not bfloat16"):
        linear(jnp.ones((1, 16), jnp.bfloat16), jnp.ones((4, 16)), implementation="cpu")
