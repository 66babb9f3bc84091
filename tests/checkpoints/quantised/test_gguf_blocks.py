"""What lies in GGUF's blocks, against the gguf package's own reading of them."""

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.checkpoints.quantised.gguf_blocks import quantised_format, read_blocks

# Where a block has its float16 numbers, in bytes, and the format that holds it.
KINDS = {
    Kind.Q8_0: ((0,), "int8-g32-float16"),
    Kind.Q4_0: ((0,), "int4-g32-float16"),
    Kind.Q4_1: ((0, 2), "int4-g32-float16-minimums"),
    Kind.Q5_0: ((0,), "int5-g32-float16"),
    Kind.Q5_1: ((0, 2), "int5-g32-float16-minimums"),
    Kind.Q4_K: ((0, 2), "int4-g32-float32-minimums"),
    Kind.Q5_K: ((0, 2), "int5-g32-float32-minimums"),
    Kind.Q6_K: ((208,), "int6-g16-float32"),
}
EDGES = np.array([0.0, -0.0, 2**-24, -(2**-24), 6.1e-5, 65504, -65504, 1, -1], np.float16)


def blocks_of(kind, rows, blocks, seed):
    """Random rows [rows, bytes], whose float16 numbers are finite, many of them extreme."""
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (rows, blocks, GGML_QUANT_SIZES[kind][1]), np.uint8)
    for start in KINDS[kind][0]:
        numbers = raw[..., start : start + 2].copy().view(np.float16)[..., 0]
        edges = random.choice(EDGES, numbers.shape)
        numbers = np.where(np.isfinite(numbers) & (random.random(numbers.shape) < 0.7),
                           numbers, edges)  # fmt: skip
        raw[..., start : start + 2] = numbers[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 5), blocks=st.integers(1, 4))
def test_equals_gguf_bit_for_bit(kind, seed, rows, blocks):
    """Every pattern of codes and small scales, zeros' signs included: nothing is rounded."""
    raw = blocks_of(kind, rows, blocks, seed)
    weight = read_blocks(raw, kind)
    assert weight.shape == (rows, blocks * GGML_QUANT_SIZES[kind][0])
    assert_same_bits(weight.dequantise(), dequantize(raw, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_many_blocks_and_some_rows_of_them(kind):
    """More blocks than are moved at once; rows read alone are the same rows."""
    raw = blocks_of(kind, 40, 33, seed=3).reshape(2, 20, -1)
    whole = read_blocks(raw, kind)
    assert str(whole.format) == KINDS[kind][1]
    assert whole.format == quantised_format(kind)
    assert_same_bits(whole.dequantise(), dequantize(raw, kind).reshape(whole.shape))
    rows = read_blocks(raw[1, 3:7], kind)
    np.testing.assert_array_equal(rows.values, whole.values[1, 3:7])
    np.testing.assert_array_equal(rows.scales, whole.scales[1, 3:7])
    if whole.minimums is not None:
        np.testing.assert_array_equal(rows.minimums, whole.minimums[1, 3:7])


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.IQ4_NL, Kind.F16, Kind.BF16])
def test_other_types_have_no_format(kind):
    assert quantised_format(kind) is None


@pytest.mark.parametrize("kind", KINDS)
def test_bits_held(kind):
    """Formats take as many bits as the file, except where scales are products in float32."""
    size, octets = GGML_QUANT_SIZES[kind]
    raw = np.zeros((1, octets * 2), np.uint8)
    held = read_blocks(raw, kind).nbytes * 8 / (2 * size)
    more = {Kind.Q4_K: 1.5, Kind.Q5_K: 1.5, Kind.Q6_K: 1.4375}
    assert held == octets * 8 / size + more.get(kind, 0)
