"""A quantised checkpoint on disk, read as if each of its weights were one tensor."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.checkpoints.quantised.hf_config import read_quantisation
from jaxserve.checkpoints.quantised.hf_weights import HfWeights
from jaxserve.core.errors import CheckpointError
from jaxserve.files.safetensors_file import map_tensors
from pallas_kernels.weights import Quantised

UP, DOWN, HEAD = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "lm_head"
EMBED, NORM, CACHE = "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.attn.k_scale"
OUT, IN, GROUP = 24, 64, 16


def opened(tmp_path, config, tensors):
    save_file(tensors, tmp_path / "x")
    return HfWeights(map_tensors(tmp_path / "x"), read_quantisation(config))


def gptq(random, order=None):
    """Tensors of eight bits, symmetric, version 2, and the numbers that they hold."""
    codes = random.integers(0, 256, (OUT, IN)).astype(np.uint8)
    scales = random.random((OUT, IN // GROUP)).astype(np.float16)
    groups = np.arange(IN) // GROUP if order is None else random.permutation(IN) // GROUP
    tensors = {
        "qweight": codes.view(np.int32).T.copy(),
        "qzeros": np.full((IN // GROUP, OUT // 4), 0x80808080, np.uint32).view(np.int32),
        "scales": scales.T.copy(),
        "g_idx": groups.astype(np.int32),
        "bias": np.ones(OUT, np.float16),
    }
    return tensors, (codes - np.float32(128)) * scales.astype(np.float32)[:, groups]


def test_gptq_checkpoint(tmp_path):
    """Weights in order are quantised ones; in an order of their own they are put in order."""
    random = np.random.default_rng(0)
    (up, up_numbers), (down, down_numbers) = gptq(random), gptq(random, order=True)
    tensors = {f"{UP}.{k}": v for k, v in up.items()} | {f"{DOWN}.{k}": v for k, v in down.items()}
    tensors |= {
        EMBED: np.ones((8, IN), np.float16),
        NORM: np.ones(IN, np.float16),
        f"{HEAD}.weight": np.full((8, IN), 2, np.float16),
    }
    config = {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "sym": True,
              "desc_act": True, "checkpoint_format": "gptq_v2"}  # fmt: skip
    weights = opened(tmp_path, config, tensors)
    assert weights.shapes == {
        f"{UP}.weight": (OUT, IN), f"{UP}.bias": (OUT,), f"{DOWN}.weight": (OUT, IN),
        f"{DOWN}.bias": (OUT,), EMBED: (8, IN), NORM: (IN,), f"{HEAD}.weight": (8, IN),
    }  # fmt: skip

    read = weights.read(f"{UP}.weight", slice(3, 9))
    assert isinstance(read, Quantised) and read.format == weights.format(f"{UP}.weight")
    assert str(read.format) == "int8-g16-float16"
    np.testing.assert_array_equal(read.dequantise(), up_numbers[3:9])
    assert weights.order(f"{UP}.weight") is None

    assert weights.format(f"{DOWN}.weight") is None
    np.testing.assert_array_equal(weights.read(f"{DOWN}.weight"), down_numbers)
    order = weights.order(f"{DOWN}.weight")
    ordered = weights.read_ordered(f"{DOWN}.weight").dequantise()
    np.testing.assert_array_equal(ordered, down_numbers[:, order])

    for name in (EMBED, f"{HEAD}.weight", f"{UP}.bias"):
        assert weights.format(name) is None and weights.order(name) is None
        np.testing.assert_array_equal(weights.read(name, slice(1, 3)), tensors[name][1:3])


def test_fp8_checkpoint(tmp_path):
    """Scales of activations and of the KV cache have no place among the tensors of a model."""
    numbers = np.random.default_rng(0).standard_normal((OUT, IN)).astype(ml_dtypes.float8_e4m3fn)
    tensors = {
        f"{UP}.weight": numbers,
        f"{UP}.weight_scale": np.array([0.5], np.float32),
        f"{UP}.input_scale": np.array([1.0], np.float32),
        f"{HEAD}.weight": np.ones((4, IN), np.float16),
        CACHE: np.array([1.0], np.float32),
    }
    config = {"quant_method": "fp8", "activation_scheme": "static"}
    weights = opened(tmp_path, config, tensors)
    assert weights.shapes == {f"{UP}.weight": (OUT, IN), f"{HEAD}.weight": (4, IN)}
    read = weights.read(f"{UP}.weight")
    assert isinstance(read, Quantised)
    np.testing.assert_array_equal(read.dequantise(), numbers.astype(np.float32) / 2)


def test_names_the_weight_at_fault(tmp_path):
    tensors, _ = gptq(np.random.default_rng(0))
    config = {"quant_method": "gptq", "bits": 8, "group_size": GROUP}
    broken = {f"{UP}.{k}": v for k, v in tensors.items() if k != "scales"}
    with pytest.raises(CheckpointError, match=f"{UP}.weight: tensor scales is missing"):
        opened(tmp_path, config, broken)
    broken = {f"{UP}.{k}": v for k, v in tensors.items()}
    broken[f"{UP}.scales"] = np.ones((3, OUT), np.float16)
    with pytest.raises(CheckpointError, match=f"{UP}.weight: tensor scales has shape"):
        opened(tmp_path, config, broken)
    broken[f"{UP}.qweight"] = np.ones(5, np.int32)
    with pytest.raises(CheckpointError, match=f"{UP}.weight: tensor qweight .* a matrix"):
        opened(tmp_path, config, broken)
    with pytest.raises(CheckpointError, match="whole groups of 48"):
        opened(tmp_path, {**config, "group_size": 48}, {f"{UP}.{k}": v for k, v in tensors.items()})
