"""What compressed-tensors writes, against what that package makes of it."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxserve.checkpoints.quantised.blocks import CHANNEL, Blocks
from jaxserve.checkpoints.quantised.compressed_tensors import Compressed
from jaxserve.checkpoints.quantised.fp8 import Fp8
from jaxserve.checkpoints.quantised.hf_config import read_quantisation
from jaxserve.core.errors import CheckpointError

REFERENCES = Path(__file__).parents[2] / "references" / "compressed-tensors.npz"
MODULE = "model.layers.0.mlp.down_proj"
FORMATS = {
    "w4-group": "int4-g32-float16",
    "w4-group-zeros": "int4-g32-float32-minimums",
    "w4-channel-zeros": "int4-channel-float32-minimums",
    "w8-channel": "int8-channel-bfloat16",
    "w8-group-zeros": "int8-g32-float32-minimums",
    "w8a8": "int8-channel-bfloat16",
    "w8a8-tensor-zeros": "int8-channel-float32-minimums",
    "fp8-channel": "fp8-channel-bfloat16",
    "fp8-tensor": "fp8-channel-float32",
    "fp8-block": "fp8-g32-float32",  # blocks of 64 in rows of 96
}


@pytest.fixture(scope="module")
def references():
    """Case -> (its configuration, tensors by suffix, what they stand for)."""
    with np.load(REFERENCES) as stored:
        arrays = dict(stored)
    types, configs = (json.loads(arrays.pop(name).tobytes()) for name in ("types", "configs"))
    tensors: dict[str, dict[str, np.ndarray]] = {case: {} for case in configs}
    for name, array in arrays.items():
        case, suffix = name.split("/")
        narrow = types[name] in ("bfloat16", "float8_e4m3fn")
        tensors[case][suffix] = array.view(getattr(ml_dtypes, types[name])) if narrow else array
    return {case: (configs[case], found, found.pop("expected")) for case, found in tensors.items()}


@pytest.mark.parametrize("case", FORMATS)
def test_equals_compressed_tensors(references, case):
    config, tensors, expected = references[case]
    scheme = read_quantisation(config).scheme(MODULE, tensors)
    assert scheme is not None
    scheme.check({suffix: tensor.shape for suffix, tensor in tensors.items()}, expected.shape)
    weight = scheme.read(tensors, expected.shape)
    assert str(weight.format) == FORMATS[case]
    scales = tensors["weight_scale"].dtype.name
    assert weight.format == scheme.format(expected.shape, scales)
    if case == "w8a8-tensor-zeros":  # float32 scales: the minimum is rounded
        np.testing.assert_allclose(weight.dequantise(), expected, rtol=0, atol=1e-6)
    else:
        np.testing.assert_array_equal(weight.dequantise(), expected)
    rows = scheme.read(tensors, expected.shape, slice(5, 22))
    np.testing.assert_array_equal(rows.dequantise(), weight.dequantise()[5:22])
    assert (
        scheme.activations
        == {"w4": None, "w8": None, "w8a8": "int8", "fp8": "fp8"}[
            "w8a8" if case.startswith("w8a8") else case.partition("-")[0]
        ]
    )


@pytest.mark.parametrize("case", FORMATS)
def test_modules_left_as_they_were(references, case):
    quantisation = read_quantisation(references[case][0])
    assert quantisation.scheme("lm_head", references[case][1]) is None  # `ignore`
    assert quantisation.scheme(MODULE, {"weight"}) is None
    assert quantisation.scheme("model.embed_tokens", references[case][1], "Embedding") is None


def test_activation_order():
    """`weight_g_idx`: columns are put in the order of their groups, and `order` says which."""
    random = np.random.default_rng(0)
    rows, columns, group = 8, 64, 16
    codes = random.integers(-8, 8, (rows, columns)).astype(np.int8)
    scales = random.random((rows, columns // group)).astype(np.float16)
    g_idx = random.permutation(np.arange(columns) // group).astype(np.int32)
    scheme = Compressed(bits=4, blocks=Blocks(1, group), symmetric=True, packed=False)
    tensors = {"weight": codes, "weight_scale": scales, "weight_g_idx": g_idx}
    numbers = codes * scales.astype(np.float32)[:, g_idx]
    order = scheme.order(tensors)
    assert order is not None
    np.testing.assert_array_equal(scheme.read(tensors, codes.shape).dequantise(), numbers[:, order])
    assert scheme.order({**tensors, "weight_g_idx": np.full(columns, -1, np.int32)}) is None


def test_old_zero_points_a_byte_each():
    random = np.random.default_rng(1)
    words = random.integers(-(2**31), 2**31, (8, 4), np.int64).astype(np.int32)
    zeros = random.integers(-8, 8, (8, 1)).astype(np.int8)
    scales = random.random((8, 1)).astype(np.float16)
    scheme = Compressed(bits=4, blocks=CHANNEL, symmetric=False, packed=True)
    tensors = {"weight_packed": words, "weight_scale": scales, "weight_zero_point": zeros}
    shifts = np.arange(0, 32, 4)
    codes = (words[..., None] >> shifts & 15).reshape(8, 32) - 8
    expected = (codes - zeros) * scales.astype(np.float32)
    np.testing.assert_array_equal(scheme.read(tensors, (8, 32)).dequantise(), expected)


def test_refuses_what_does_not_fit(references):
    _, tensors, expected = references["w4-group"]
    scheme = Compressed(bits=4, blocks=Blocks(1, 32), symmetric=True, packed=True)
    shapes = {suffix: tensor.shape for suffix, tensor in tensors.items()}
    with pytest.raises(
        CheckpointError, match=r"weight_packed has shape .24, 12., expected .24, 8."
    ):
        scheme.check(shapes, (24, 64))
    with pytest.raises(CheckpointError, match="weight_scale is missing"):
        scheme.check({"weight_packed": (24, 12)}, (24, 96))
    with pytest.raises(CheckpointError, match="rows of 100 numbers are not whole groups of 32"):
        scheme.check(shapes, (24, 100))
    with pytest.raises(CheckpointError, match="weight_shape says"):
        scheme.read({**tensors, "weight_shape": np.array([96, 24])}, expected.shape)
    with pytest.raises(CheckpointError, match="multiple of 16"):
        Compressed(bits=4, blocks=Blocks(1, 8), symmetric=True, packed=True).format((8, 8), "f")
    with pytest.raises(CheckpointError, match="has type int8, expected float8_e4m3fn"):
        fp8 = {"weight": np.zeros((4, 16), np.int8), "weight_scale": np.ones(1, np.float32)}
        Fp8(blocks=Blocks(None, None)).read(fp8, (4, 16))
