"""AWQ and GPTQ, against packers written here from the formats' descriptions."""

import numpy as np
import pytest

from jaxserve.checkpoints.quantised import rows
from jaxserve.checkpoints.quantised.awq import Awq
from jaxserve.checkpoints.quantised.gptq import Gptq
from jaxserve.core.errors import CheckpointError
from pallas_kernels.weights import Format, quantise

SHAPE = OUT, IN = 48, 128
IN_ORDER, AWQ_PLACES = range(8), (0, 2, 4, 6, 1, 3, 5, 7)


def words_of(codes, bits, places=None):
    """Put codes [n, m] into words [n, m * bits / 32], by a plain loop."""
    per_word = 32 // bits
    words = np.zeros((codes.shape[0], codes.shape[1] // per_word), np.uint64)
    for i, place in enumerate(places or range(per_word)):
        words |= codes[:, place::per_word].astype(np.uint64) << np.uint64(bits * i)
    return words.astype(np.uint32).view(np.int32)


def random_parts(bits, group, seed=0, symmetric=False):
    """Codes [out, in], zero points and scales [out, groups]."""
    random = np.random.default_rng(seed)
    groups = IN // group
    codes = random.integers(0, 2**bits, SHAPE)
    zeros = random.integers(1, 2**bits, (OUT, groups))
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    return codes, zeros, (random.random((OUT, groups)) + 0.01).astype(np.float16)


def numbers_of(codes, zeros, scales, groups):
    return ((codes - zeros[:, groups]) * scales.astype(np.float32)[:, groups]).astype(np.float32)


def check(scheme, tensors, expected, format):
    """Shapes, the format, all rows, and rows that begin and end inside of words."""
    scheme.check({suffix: tensor.shape for suffix, tensor in tensors.items()}, SHAPE)
    weight = scheme.read(tensors, SHAPE)
    assert str(weight.format) == format == str(scheme.format(SHAPE, "float16"))
    np.testing.assert_array_equal(weight.dequantise(), expected)
    for first, last in ((0, 8), (13, 37), (47, 48)):
        part = scheme.read(tensors, SHAPE, slice(first, last))
        np.testing.assert_array_equal(part.dequantise(), expected[first:last])


@pytest.mark.parametrize("group", [32, 64, 128])
def test_awq(group):
    codes, zeros, scales = random_parts(4, group)
    tensors = {
        "qweight": words_of(codes.T, 4, AWQ_PLACES),
        "qzeros": words_of(zeros.T, 4, AWQ_PLACES),
        "scales": scales.T.copy(),
    }
    expected = numbers_of(codes, zeros, scales, np.arange(IN) // group)
    check(Awq(group=group), tensors, expected, f"int4-g{group}-float32-minimums")


def test_awq_word_by_hand():
    """Known words: outputs 0 to 7 lie in the nibbles 0, 4, 1, 5, 2, 6, 3, 7."""
    words = np.full((32, 1), 0x75316420, np.int32)
    tensors = {
        "qweight": words,
        "qzeros": np.zeros((1, 1), np.int32),
        "scales": np.ones((1, 8), np.float16),
    }
    numbers = Awq(group=None).read(tensors, (8, 32)).dequantise()
    np.testing.assert_array_equal(numbers[:, 0], np.arange(8))


def gptq_tensors(codes, zeros, scales, bits, version):
    return {
        "qweight": words_of(codes, bits).T.copy(),
        "qzeros": words_of(zeros.T - (version == 1), bits),
        "scales": scales.T.copy(),
    }


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(bits, symmetric, version):
    codes, zeros, scales = random_parts(bits, 32, symmetric=symmetric)
    tensors = gptq_tensors(codes, zeros, scales, bits, version)
    tensors["g_idx"] = (np.arange(IN) // 32).astype(np.int32)  # nothing is out of order
    scheme = Gptq(bits=bits, group=32, symmetric=symmetric, version=version)
    assert scheme.order(tensors) is None
    expected = numbers_of(codes, zeros, scales, np.arange(IN) // 32)
    held = "int8" if bits == 8 else "int4"
    rest = "g32-float16" if symmetric else "g32-float32-minimums"
    check(scheme, tensors, expected, f"{held}-{rest}")


def test_gptq_one_group_for_a_row():
    codes, zeros, scales = random_parts(4, IN)
    scheme = Gptq(bits=4, group=None, symmetric=False, version=1)
    tensors = gptq_tensors(codes, zeros, scales, 4, 1)
    tensors["g_idx"] = np.zeros(IN, np.int32)
    assert scheme.order(tensors) is None
    expected = numbers_of(codes, zeros, scales, np.zeros(IN, int))
    check(scheme, tensors, expected, "int4-channel-float32-minimums")


def test_gptq_version_1_wrote_with_borrows():
    """Zero points of 0 in the version that stores one less: the whole word has borrowed."""
    codes, zeros, scales = random_parts(4, 32)
    zeros[::3] = 0
    tensors = gptq_tensors(codes, zeros, scales, 4, 2)
    tensors["qzeros"] = (tensors["qzeros"].view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    weight = Gptq(bits=4, group=32, symmetric=False, version=1).read(tensors, SHAPE)
    expected = numbers_of(codes, zeros, scales, np.arange(IN) // 32)
    np.testing.assert_array_equal(weight.dequantise(), expected)


def test_gptq_activation_order():
    """The product is that of x in `order`; or of x, once the rows before are in that order."""
    codes, zeros, scales = random_parts(4, 32)
    g_idx = np.random.default_rng(1).permutation(np.arange(IN) // 32).astype(np.int32)
    scheme = Gptq(bits=4, group=32, symmetric=False, version=1)
    tensors = {**gptq_tensors(codes, zeros, scales, 4, 1), "g_idx": g_idx}
    expected = numbers_of(codes, zeros, scales, g_idx)
    order = scheme.order(tensors)
    assert order is not None and order.dtype == np.int32
    weight = scheme.read(tensors, SHAPE)
    check(scheme, tensors, expected[:, order], "int4-g32-float32-minimums")

    before = quantise(np.random.default_rng(2).standard_normal((IN, 32)).astype(np.float32),
                      Format("int8"))  # fmt: skip
    x = before.dequantise()[:, 0]
    y = rows.take_rows(before, order).dequantise()[:, 0]
    np.testing.assert_array_equal(x[order], y)
    np.testing.assert_allclose(weight.dequantise() @ y, expected @ x, rtol=1e-4)


def test_refuses_what_contradicts():
    codes, zeros, scales = random_parts(4, 32)
    tensors = gptq_tensors(codes, zeros, scales, 4, 1)
    scheme = Gptq(bits=4, group=32, symmetric=True, version=1)
    with pytest.raises(CheckpointError, match=r"sym, .* 8 everywhere, but qzeros says 1 to 15"):
        scheme.read(tensors, SHAPE)
    scheme = Gptq(bits=4, group=32, symmetric=False, version=1)
    tensors["g_idx"] = np.zeros(IN, np.int32)
    with pytest.raises(CheckpointError, match="g_idx does not divide its inputs into groups of 32"):
        scheme.read(tensors, SHAPE)
    tensors["g_idx"] = np.full(IN, -1, np.int32)
    with pytest.raises(CheckpointError, match="g_idx does not divide"):
        scheme.read(tensors, SHAPE)
    with pytest.raises(CheckpointError, match="takes a multiple of 32 inputs, not 16"):
        Awq(group=16).format((8, 16), "float16")
    with pytest.raises(CheckpointError, match="whole words of 8 codes"):
        scheme.check({}, (47, 128))
    with pytest.raises(CheckpointError, match="a multiple of 8 outputs, not 47"):
        Awq(group=32).check({}, (47, 128))
    with pytest.raises(CheckpointError, match="rows of 100 numbers are not whole groups of 32"):
        Awq(group=32).check({}, (48, 100))
