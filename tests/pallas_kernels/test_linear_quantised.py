"""Linear layers of quantised weights: every implementation and format against float64."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear import choose_implementation, linear
from pallas_kernels.linear.activations import quantise_activations, round_activations
from pallas_kernels.weights import Format, quantise

INTEGERS = [
    Format("int8"),
    Format("int8", 32, "float16"),
    Format("int8", 16, "bfloat16", has_minimums=True),
    Format("int4", scale="float16"),
    Format("int4", 32, "float16"),
    Format("int4", 32, "float16", has_minimums=True),
    Format("int4", 128, "bfloat16"),
    Format("int5", 32, has_minimums=True),
    Format("int6", 16),
]
FORMATS = [*INTEGERS, Format("fp8", scale="bfloat16"), Format("fp8", 128)]
IMPLEMENTATIONS = ["cpu", "xla", "reference"]


def draw(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def error(out: Any, expected: np.ndarray) -> float:
    """||out - expected|| / ||expected||."""
    difference = np.asarray(out, np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_exact(format: Format, implementation: str) -> None:
    """Axes of outputs and of inputs, which are flattened; more and fewer tokens than a tile has."""
    weight = quantise(draw(7, 11, 384, seed=1), format)
    expected = weight.dequantise().astype(np.float64).reshape(77, 384).T
    for tokens in (1, 67):
        x = draw(tokens, 3, 128)
        out = jax.jit(lambda x, w: linear(x, w, implementation=implementation))(x, weight)
        assert out.shape == (tokens, 7, 11) and out.dtype == np.float32
        wanted = x.reshape(tokens, 384).astype(np.float64) @ expected
        assert error(out.reshape(tokens, 77), wanted) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", INTEGERS, ids=str)
def test_rounded_activations(format: Format, implementation: str) -> None:
    """Of the rounded activations the product is exact; rounding them costs what 8 bits must."""
    weight, x = quantise(draw(41, 256, seed=1), format), draw(19, 256)
    x[3] = 0
    out = linear(x, weight, implementation=implementation, activations="int8")
    numbers = weight.dequantise().astype(np.float64).T
    assert error(out, np.asarray(round_activations(x, format), np.float64) @ numbers) < 1e-6
    assert error(out, x.astype(np.float64) @ numbers) < 0.01
    assert not np.asarray(out[3]).any()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("format", [Format("int8"), Format("int4", 32), Format("fp8")], ids=str)
def test_bfloat16(format: Format, implementation: str) -> None:
    weight, x = quantise(draw(41, 256, seed=1), format), draw(5, 256).astype(jnp.bfloat16)
    out = linear(x, weight, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    assert error(out, x.astype(np.float64) @ weight.dequantise().astype(np.float64).T) < 0.01


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize(
    ("format", "inputs"),
    [
        (Format("int4", 32, "float16"), 576),
        (Format("int6", 16), 160),  # blocks of two groups, and no whole number of segments
        (Format("int6", 48, "float32", has_minimums=True), 288),
        (Format("int8", 16, "bfloat16"), 48),  # half a block is left over
        (Format("int8", has_minimums=True), 97),  # no block is whole at the end of a row
    ],
    ids=str,
)
def test_cpu_at_any_number_of_tokens(format: Format, inputs: int, activations: Any) -> None:
    """A row comes out in the same bits alone, among others, and in a padded shape."""
    weight, x = quantise(draw(53, inputs, seed=1), format), draw(19, inputs)
    call = jax.jit(
        lambda x, num_tokens: linear(
            x, weight, implementation="cpu", activations=activations, num_tokens=num_tokens
        )
    )
    all_rows = np.asarray(call(x, 19))
    numbers = x if activations == "float" else np.asarray(round_activations(x, format))
    expected = numbers.astype(np.float64) @ weight.dequantise().astype(np.float64).T
    assert error(all_rows, expected) < 1e-6
    for count in (0, 1, 3, 8, 17):
        out = np.asarray(call(x, count))
        np.testing.assert_array_equal(out[:count], all_rows[:count])
        assert not out[count:].any()
    for count in (1, 7):
        np.testing.assert_array_equal(call(x[:count], count), all_rows[:count])


def test_rounding_of_activations() -> None:
    """A token's codes are its own; groups are the weight's."""
    x = draw(3, 64)
    codes, scales = quantise_activations(x, Format("int8", 32))
    assert codes.shape == (3, 64) and codes.dtype == np.int8 and scales.shape == (3, 2)
    assert (abs(np.asarray(codes, np.int32)).reshape(3, 2, 32).max(-1) == 127).all()
    whole, _ = quantise_activations(x, Format("int8"))
    assert (abs(np.asarray(whole, np.int32)).max(-1) == 127).all()
    alone, _ = quantise_activations(x[1:2], Format("int8", 32))
    np.testing.assert_array_equal(alone[0], codes[1])


def test_weights_are_not_kept_as_floats() -> None:
    """A chain of products takes temporary memory for one weight at a time at most."""
    weights = [quantise(draw(512, 512, seed=i), Format("int4", 32, "float16")) for i in range(8)]

    def chain(x: jax.Array) -> jax.Array:
        for weight in weights:
            x = linear(x, weight, implementation="xla")
        return x

    memory = jax.jit(chain).lower(draw(4, 512)).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2.5 * 4 * 512 * 512


def test_choice() -> None:
    cpu, format = SimpleNamespace(platform="cpu"), Format("int4", 32)
    assert choose_implementation("auto", cpu, jnp.float32, format) == "cpu"
    assert choose_implementation("auto", cpu, jnp.bfloat16, format) == "xla"
    assert choose_implementation("xla", cpu, jnp.float32, format) == "xla"


def test_what_does_not_fit_is_refused() -> None:
    weight = quantise(draw(8, 64), Format("fp8"))
    with pytest.raises(ValueError, match="no activations 'int4'; there are float, int8"):
        linear(draw(1, 64), weight, activations="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="take a weight of integer codes, not fp8-channel"):
        linear(draw(1, 64), weight, activations="int8")
    with pytest.raises(ValueError, match="take a weight of integer codes, not float32"):
        linear(draw(1, 64), draw(8, 64), activations="int8")
    with pytest.raises(ValueError, match=r"activations \[1, 32\] do not fit a weight \[8, 64\]"):
        linear(draw(1, 32), weight)


ON_AVX2 = """
import llvmlite.binding as llvm
features = llvm.get_host_cpu_features()
for name in features:
    if name.startswith("avx512") or name == "avxvnni":
        features[name] = False
llvm.get_host_cpu_features = lambda: features

import jax, numpy as np
from pallas_kernels.cpu_calls.integer_tiles import best_instructions
from pallas_kernels.linear import linear
from pallas_kernels.linear.activations import round_activations
from pallas_kernels.weights import Format, quantise

assert best_instructions() == ("avx2", 8)
random = np.random.default_rng(0)
for format in (
    Format("int8", 32, "float16"), Format("int4", 32), Format("int4", 32, has_minimums=True),
    Format("int5"), Format("int6", 16),
):
    weight = quantise(random.standard_normal((53, 160), np.float32), format)
    weight.values.reshape(-1)[:64] = -128 if format.codes == "int8" else 255  # the largest codes
    x = random.standard_normal((7, 160), np.float32)
    expected = weight.dequantise().astype(np.float64).T
    for activations in ("float", "int8"):
        out = jax.jit(lambda x, w: linear(
            x, w, implementation="cpu", activations=activations))(x, weight)
        numbers = x if activations == "float" else np.asarray(round_activations(x, format))
        wanted = numbers.astype(np.float64) @ expected
        assert np.linalg.norm(out - wanted) < 1e-6 * np.linalg.norm(wanted), (format, activations)
"""


@pytest.mark.slow
def test_cpus_without_avx512(tmp_path: Path) -> None:
    """In a process of its own, which compiles for such a CPU and keeps its code to itself."""
    with_avx2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+bmi2"}
    environment = {**os.environ, **with_avx2, "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", ON_AVX2], env=environment, check=True, timeout=600)
