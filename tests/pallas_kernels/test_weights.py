"""Quantised weights: codes in memory, what is lost in rounding, and what does not fit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.weights import BLOCK, Format, Quantised, from_codes, pack, quantise, unpack

PACKED = ("int4", "int5", "int6")
FORMATS = st.builds(
    Format,
    st.sampled_from([*PACKED, "int8"]),
    st.sampled_from([0, 16, 32, 64, 128]),
    st.sampled_from(["float16", "bfloat16", "float32"]),
    st.booleans(),
) | st.builds(Format, st.just("fp8"), st.sampled_from([0, 32, 128]), st.just("float32"))


def draw(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@given(codes=st.sampled_from([*PACKED, "int8"]), blocks=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_codes_come_out_as_they_went_in(codes: str, blocks: int, seed: int) -> None:
    """In no more bits than they need."""
    format = Format(codes)
    least = -128 if codes == "int8" else 0
    random = np.random.default_rng(seed)
    numbers = random.integers(least, least + 2**format.bits, (3, 2, blocks * BLOCK))
    numbers = numbers.astype(format.value_type)
    values = pack(numbers, format)
    assert values.nbytes == numbers.size * format.bits // 8
    assert values.dtype == format.value_type
    np.testing.assert_array_equal(unpack(values, format), numbers)


def test_where_codes_lie() -> None:
    """Loaders of files and kernels rely on it."""
    codes = np.arange(32, dtype=np.uint8)[None]
    values = pack(codes, Format("int5"))[0]
    assert values[:3].tolist() == [0x00, 0x11, 0x22]  # codes 0 and 16, 1 and 17, 2 and 18
    assert values[16:].tolist() == [0, 0, 255, 255]  # fifth bits: those from 16 on


@given(format=FORMATS, seed=st.integers(0, 99))
@settings(max_examples=80)
def test_rounding(format: Format, seed: int) -> None:
    """No number is off by more than half a code's distance, or a whole one where codes end."""
    weight = draw(3, 2, 256, seed=seed)
    rounded = quantise(weight, format)
    assert rounded.shape == weight.shape and rounded.dtype == np.float32
    assert rounded.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(rounded))
    numbers = rounded.dequantise()
    step = abs(rounded.scales.astype(np.float32))[..., None]
    error = abs(numbers - weight).reshape(*step.shape[:-1], -1)
    if format.codes == "fp8":
        assert (error <= abs(weight.reshape(error.shape)) / 16 + step * 2**-9).all()
    else:
        # Scales and minimums are rounded themselves, which moves the grid's ends.
        slack = float(jnp.finfo(format.scale).eps) * 2 ** (format.bits + 1) + 1e-3
        assert (error <= step * ((1 if format.offset else 0.5) + slack)).all()
    again = from_codes(rounded.codes(), rounded.scales, rounded.minimums, format)
    np.testing.assert_array_equal(again.dequantise(), numbers)


@pytest.mark.parametrize(
    "format",
    [Format("int6", 32, "float16", has_minimums=True), Format("int4", 16), Format("fp8")],
    ids=str,
)
def test_numpy_and_jax_agree(format: Format) -> None:
    weight = draw(2, 128)
    mine = quantise(weight, format)
    other = jax.jit(lambda weight: quantise(weight, format))(weight)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
    np.testing.assert_allclose(other.dequantise(), mine.dequantise(), rtol=1e-6, atol=1e-7)


@given(format=FORMATS)
def test_names(format: Format) -> None:
    assert Format.parse(str(format)) == format


@pytest.mark.parametrize("name", ["", "int4", "int4-g32", "int4-32x-float16", "int4-g32-float16-x"])
def test_names_of_no_format(name: str) -> None:
    with pytest.raises(ValueError, match="no format"):
        Format.parse(name)


def test_zeros_stay_zeros() -> None:
    for codes in (*PACKED, "int8", "fp8"):
        assert not quantise(np.zeros((2, 64), np.float32), Format(codes, 32)).dequantise().any()


def test_rows_are_looked_up_in_all_arrays_alike() -> None:
    weight = quantise(draw(11, 64), Format("int5", 32, has_minimums=True))
    rows = jax.tree.map(lambda leaf: leaf[np.array([3, 3, 7])], weight)
    assert isinstance(rows, Quantised) and rows.shape == (3, 64)
    np.testing.assert_array_equal(rows.dequantise(), weight.dequantise()[[3, 3, 7]])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Format("int3"), "no codes 'int3'; there are int4"),
        (lambda: Format("int4", 24), "a multiple of 16 inputs, or 0 for all, not of 24"),
        (lambda: Format("int4", 32, "int8"), "no scales of 'int8'; there are float16"),
        (lambda: Format("fp8", 32, has_minimums=True), "fp8 has no minimums"),
        (lambda: quantise(draw(2, 48), Format("int4")), "a multiple of 32 inputs, not 48"),
        (lambda: quantise(draw(2, 96), Format("int8", 64)), "a multiple of 64 inputs, not 96"),
        (lambda: Format("int4", 64).check_inputs(192, 2), "of 64 inputs in each of 2 shards"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()  # type: ignore[operator]


def test_arrays_of_another_format_are_refused() -> None:
    codes, scales = np.zeros((4, 64), np.uint8), np.ones((4, 2), np.float16)
    fine = Format("int4", 32, "float16")
    assert from_codes(codes, scales, None, fine).shape == (4, 64)
    with pytest.raises(
        ValueError, match=r"scales of int4-g16.* must be float16\[4, 4\], not float"
    ):
        from_codes(codes, scales, None, Format("int4", 16, "float16"))
    with pytest.raises(ValueError, match=r"must be float32\[4, 2\], not float16"):
        from_codes(codes, scales, None, Format("int4", 32))
    with pytest.raises(ValueError, match="has no minimums, and some were given"):
        from_codes(codes, scales, scales, fine)
    with pytest.raises(ValueError, match=r"minimums of int4.*, not none"):
        from_codes(codes, scales, None, Format("int4", 32, "float16", has_minimums=True))
