"""Floats quantised with a search for the least error."""

import ml_dtypes
import numpy as np
import pytest

from jaxserve.checkpoints.quantised.search import quantise_float
from pallas_kernels.weights import Format, quantise

# How much of the squared error of the plain rule is left at most, over numbers as weights have
# them: a bell with thick tails.
SEARCHED = {
    Format("int4", 32, "float16"): 0.94,
    Format("int4", 32, "float16", True): 0.84,
    Format("int4", 64, "bfloat16"): 0.94,
    Format("int4"): 0.9,
    Format("int5", 32, "float16"): 0.95,
    Format("int6", 16, "float32", True): 0.85,
}


def weight_like(*shape):
    random = np.random.default_rng(0)
    return (random.standard_t(5, shape) * 0.02 + 0.001).astype(np.float32)


def group_errors(weight, array):
    wrong = (weight.dequantise() - array).astype(np.float64)
    return np.square(wrong).reshape(*weight.scales.shape, -1).sum(-1)


@pytest.mark.parametrize(("format", "share"), SEARCHED.items(), ids=map(str, SEARCHED))
def test_searched_formats_lose_less(format, share):
    """Overall clearly less than by the plain rule, and in no group more."""
    array = weight_like(6, 8, 256)
    found, plain = quantise_float(array, format), quantise(array, format)
    found.check()
    assert found.shape == array.shape and found.format == format
    errors, others = group_errors(found, array), group_errors(plain, array)
    assert (errors <= others * 1.000001).all()
    assert errors.sum() < share * others.sum()


@pytest.mark.parametrize("format", [*SEARCHED, Format("int8"), Format("fp8"), Format("int8", 32)],
                         ids=str)  # fmt: skip
def test_rows_alone_and_in_bfloat16(format):
    """Parts of rows are quantised as all rows are; the type is that of a checkpoint."""
    array = weight_like(600, 128).astype(ml_dtypes.bfloat16)  # more than one part of the work
    whole = quantise_float(array, format)
    some = quantise_float(array[511:514], format)
    np.testing.assert_array_equal(whole.dequantise()[511:514], some.dequantise())


@pytest.mark.parametrize("format", SEARCHED, ids=str)
def test_extreme_groups(format):
    """Zeros stay zeros, constants and lone outliers are met, and nothing overflows or is NaN."""
    array = np.zeros((6, 128), np.float32)
    array[1], array[2, 5], array[3] = 0.75, -3.0, 1e-30
    array[4] = np.linspace(-1e6, 1e6, 128)
    array[5, ::2] = -0.0
    numbers = quantise_float(array, format).dequantise()
    assert np.isfinite(numbers).all()
    np.testing.assert_array_equal(numbers[[0, 5]], 0)
    np.testing.assert_allclose(numbers[1], 0.75, rtol=0.01)
    np.testing.assert_allclose(numbers[2], array[2], rtol=0.01, atol=1e-3)
    np.testing.assert_allclose(numbers[3], 0, atol=1e-6)


def test_exact_where_numbers_lie_on_the_grid():
    """What was quantised once and made float again is found again, code for code."""
    format = Format("int4", 32, "float32", True)
    first = quantise(weight_like(16, 128), format)
    again = quantise_float(first.dequantise(), format)
    np.testing.assert_array_equal(again.values, first.values)
    np.testing.assert_allclose(again.dequantise(), first.dequantise(), rtol=0, atol=1e-7)


def test_refuses_inputs_that_are_no_groups():
    with pytest.raises(ValueError, match="multiple of 32 inputs, not 40"):
        quantise_float(weight_like(2, 40), Format("int4", 32))
