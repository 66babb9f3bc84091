"""Quantised Hugging Face directories give a model the numbers of the same weights in float32."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.checkpoints.load import open_checkpoint
from pallas_kernels.weights import Format, Quantised, quantise

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def int8(weight):
    """compressed-tensors, a byte each, a scale for each row."""
    found = quantise(weight, Format("int8", 0, "bfloat16"))
    return found, {"weight": found.values, "weight_scale": found.scales}


def fp8(weight):
    """One scale for a tensor, and what was calibrated for activations."""
    scale = np.float32(abs(weight).max() / 448)
    values = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
    found = Quantised(values, np.full((len(values), 1), scale), None, Format("fp8"))
    return found, {
        "weight": values,
        "weight_scale": scale.reshape(1),
        "input_scale": np.ones(1, np.float32),
    }


def gptq(weight):
    """Four bits around zero, in groups of 32, words put together by a plain loop."""
    found = quantise(weight, Format("int4", 32, "float16"))
    codes = np.ascontiguousarray(found.codes().T).astype(np.uint32)
    words = np.bitwise_or.reduce([codes[i::8] << np.uint32(4 * i) for i in range(8)])
    return found, {
        "qweight": words.view(np.int32),
        "qzeros": np.full((weight.shape[1] // 32, len(weight) // 8), 0x77777777, np.int32),
        "scales": found.scales.T.copy(),
        "g_idx": (np.arange(weight.shape[1]) // 32).astype(np.int32),
    }


W8A8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
CASES = {
    int8: {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
           "config_groups": {"0": {"targets": ["Linear"], "weights": W8A8}}},
    fp8: {"quant_method": "fp8", "activation_scheme": "static"},
    gptq: {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True},
}  # fmt: skip


@pytest.mark.parametrize("store", CASES, ids=lambda store: store.__name__)
def test_every_parameter(make_hf, store):
    path, _ = make_hf("llama", even=True)
    stored, dense, formats = {}, {}, set()
    for name, tensor in load_file(path / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith(LINEAR):
            weight, parts = store(tensor)
            stored |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
            dense[name] = weight.dequantise()
            formats.add(weight.format)
        else:
            stored[name] = dense[name] = tensor
    save_file(dense, path / "model.safetensors")
    unquantised = open_checkpoint(path)
    expected = {name: unquantised.read(name) for name in unquantised.names}

    save_file(stored, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": CASES[store]}))
    checkpoint = open_checkpoint(path)
    assert checkpoint.names == set(expected)
    for name, numbers in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name), numbers, err_msg=name)
        is_linear = name.endswith(("qkv", "o", "gate_up", "down"))
        assert set(checkpoint.formats(name)) == (formats if is_linear else {None})
