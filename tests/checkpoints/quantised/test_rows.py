"""Outputs of quantised weights move as those of dense ones do."""

import numpy as np
import pytest

from jaxserve.checkpoints.quantised import rows
from jaxserve.models.parameters import interleaved_to_halves
from pallas_kernels.weights import Format, quantise

FORMATS = [
    Format("int4", 32, "float16", True),
    Format("int5", 32),
    Format("int6", 16),
    Format("int8"),
    Format("fp8", 16, "bfloat16"),
]
KVH, GROUP, DIM, INPUTS = 2, 3, 4, 64


def random_weight(*shape, format, seed=0):
    numbers = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return quantise(numbers, format)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_joining_qkv(format):
    """Rotary halves, KV heads and the join of Q, K and V: the same function of dense numbers."""
    q, k, v = (
        random_weight(heads * DIM, INPUTS, format=format, seed=i)
        for i, heads in enumerate((KVH * GROUP, KVH, KVH))
    )

    def join(q, k, v):
        q, k = interleaved_to_halves(q, DIM), interleaved_to_halves(k, DIM)
        split = [x.reshape(KVH, -1, DIM, x.shape[-1]) for x in (q, k, v)]
        return np.concatenate(split, axis=1)

    joined = rows.on_outputs(join, q, k, v)
    assert joined.shape == (KVH, GROUP + 2, DIM, INPUTS)
    expected = join(q.dequantise(), k.dequantise(), v.dequantise())
    np.testing.assert_array_equal(joined.dequantise(), expected)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_taking_joining_repeating_and_padding(format):
    a, b = (random_weight(6, INPUTS, format=format, seed=i) for i in range(2))
    x, y = a.dequantise(), b.dequantise()
    order = [5, 0, 0, 3]
    np.testing.assert_array_equal(rows.take_rows(a, order).dequantise(), x[order])
    np.testing.assert_array_equal(rows.concatenate(a, b).dequantise(), np.concatenate([x, y]))

    def check(change):
        np.testing.assert_array_equal(rows.map_rows(change, a).dequantise(), change(x))

    check(lambda array: array.reshape(2, 3, -1).repeat(2, 0))  # KV heads, for a larger mesh
    check(lambda array: np.concatenate([array, np.zeros((2, array.shape[-1]), array.dtype)]))
    np.testing.assert_array_equal(rows.map_rows(lambda array: array[1:], x), x[1:])  # dense


def test_parts_of_different_formats_stay_parts():
    a, b = (random_weight(4, INPUTS, format=format) for format in (Format("int4", 32), FORMATS[2]))
    with pytest.raises(ValueError, match="int4-g32-float32 and int6-g16-float32 cannot be one"):
        rows.concatenate(a, b)
    with pytest.raises(ValueError, match="32 and 64 inputs"):
        rows.concatenate(a, random_weight(4, 32, format=Format("int4", 32)))
