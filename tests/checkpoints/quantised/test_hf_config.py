"""What `quantization_config` says of each module, and what of it is refused by name."""

import contextlib
import copy

import pytest

from jaxserve.checkpoints.quantised.awq import Awq
from jaxserve.checkpoints.quantised.blocks import CHANNEL, TENSOR, Blocks
from jaxserve.checkpoints.quantised.compressed_tensors import Compressed
from jaxserve.checkpoints.quantised.fp8 import Fp8
from jaxserve.checkpoints.quantised.gptq import Gptq
from jaxserve.checkpoints.quantised.hf_config import read_quantisation
from jaxserve.core.errors import ConfigError

Q, DOWN, GATE = (
    f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.down_proj", "mlp.gate_proj")
)
PACKED = {"qweight", "qzeros", "scales", "g_idx"}

# As AutoAWQ, GPTQModel, LLM Compressor and Qwen's FP8 models write them.
AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": None,
}  # fmt: skip
GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": False,
    "lm_head": False, "checkpoint_format": "gptq", "pack_dtype": "int32", "dynamic": None,
    "damp_percent": 0.01, "static_groups": False, "true_sequential": True, "model_name_or_path": "",
    "meta": {"quantizer": ["gptqmodel:5.0.0"], "uri": "https://example.org", "mse": 0.0},
}  # fmt: skip
W4A16 = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
    "quantization_status": "compressed", "global_compression_ratio": 1.2, "version": "0.9.0",
    "kv_cache_scheme": None, "transform_config": {},
    "sparsity_config": {"format": "dense", "global_sparsity": 0.1, "targets": []},
    "config_groups": {"group_0": {
        "targets": ["Linear"], "input_activations": None, "output_activations": None,
        "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
            "group_size": 128, "actorder": "static", "block_structure": None, "dynamic": False,
            "observer": "minmax", "observer_kwargs": {},
        },
    }},
}  # fmt: skip
FP8 = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
    "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", "model.layers.0.mlp"],
}  # fmt: skip


def changed(config, **changes):
    return {**copy.deepcopy(config), **changes}


def with_weights(**changes):
    """W4A16, with other weights in its group."""
    config = copy.deepcopy(W4A16)
    config["config_groups"]["group_0"]["weights"].update(changes)
    return config


def test_awq():
    awq = read_quantisation(changed(AWQ, modules_to_not_convert=["self_attn.q_proj", "mlp.gate"]))
    assert awq.method == "awq"
    assert awq.scheme(DOWN, PACKED) == Awq(group=128)
    assert awq.scheme(Q, PACKED) is None
    assert awq.scheme(GATE, PACKED) == Awq(group=128)  # `mlp.gate` is another module
    assert awq.scheme("model.embed_tokens", PACKED, "Embedding") is None
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": -1, "zero_point": True,
           "version": "GEMM"}  # fmt: skip
    assert read_quantisation(old).scheme(Q, PACKED) == Awq(group=None)


def test_gptq():
    base = Gptq(bits=4, group=128, symmetric=False, version=1)
    gptq = read_quantisation(GPTQ)
    assert gptq.scheme(Q, PACKED) == base
    assert gptq.scheme("lm_head", {"weight"}) is None  # as the files have it
    dynamic = {r"+:.*\.0\.mlp\.down": {"bits": 8, "group_size": 32}, r"-:.*q_proj": {}}
    gptq = read_quantisation(changed(GPTQ, checkpoint_format="gptq_v2", dynamic=dynamic))
    assert gptq.scheme(DOWN, PACKED) == Gptq(bits=8, group=32, symmetric=False, version=2)
    assert gptq.scheme(Q, PACKED) is None
    assert gptq.scheme(GATE, PACKED) == Gptq(bits=4, group=128, symmetric=False, version=2)


def test_compressed_tensors():
    stored = {"weight_packed", "weight_scale", "weight_shape"}
    base = Compressed(bits=4, blocks=Blocks(1, 128), symmetric=True, packed=True)
    config = read_quantisation(W4A16)
    assert config.scheme(Q, stored) == base
    assert config.scheme("lm_head", stored) is None
    for strategy, blocks in (("channel", CHANNEL), ("tensor", TENSOR)):
        config = read_quantisation(with_weights(strategy=strategy, group_size=None, num_bits=8))
        scheme = config.scheme(Q, stored)
        assert scheme == Compressed(bits=8, blocks=blocks, symmetric=True, packed=True)
    inferred = read_quantisation(with_weights(strategy=None, group_size=-1))
    assert inferred.scheme(Q, stored) == Compressed(
        bits=4, blocks=CHANNEL, symmetric=True, packed=True
    )


def test_groups_with_targets_of_their_own():
    """A name goes before an expression, and that before a class; each group has its format."""
    config = changed(W4A16, format="mixed-precision", ignore=["re:.*gate_proj$", "lm_head"])
    groups = config["config_groups"]
    groups["group_0"]["format"] = "pack-quantized"
    fp8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    groups["group_1"] = {
        "targets": ["re:.*mlp", "model.layers.1.mlp.up_proj"], "format": "float-quantized",
        "weights": fp8, "input_activations": fp8,
    }  # fmt: skip
    groups["group_2"] = {"targets": [DOWN], "format": "int-quantized",
                         "weights": {"num_bits": 8, "strategy": "channel"}}  # fmt: skip
    groups["group_3"] = {"targets": ["re:.*o_proj"], "weights": None, "format": "naive-quantized"}
    quantisation = read_quantisation(config)
    stored = {"weight", "weight_packed", "weight_scale"}
    up = quantisation.scheme("model.layers.1.mlp.up_proj", stored)
    assert up == Fp8(blocks=TENSOR, activations="fp8")
    down = quantisation.scheme(DOWN, stored)
    assert down == Compressed(bits=8, blocks=CHANNEL, symmetric=True, packed=False)
    assert isinstance(quantisation.scheme(Q, stored), Compressed)
    assert quantisation.scheme(GATE, stored) is None
    assert quantisation.scheme("model.layers.0.self_attn.o_proj", stored) is None


def test_fp8():
    stored = {"weight", "weight_scale_inv"}
    blocks = Fp8(blocks=Blocks(128, 128), scale="weight_scale_inv", activations="fp8")
    fp8 = read_quantisation(FP8)
    assert fp8.scheme(Q, stored) == blocks
    assert fp8.scheme(DOWN, stored) is None
    static = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": [Q]}
    fp8 = read_quantisation(static)
    scheme = fp8.scheme(DOWN, {"weight", "weight_scale", "input_scale"})
    assert scheme == Fp8(blocks=TENSOR, activations="fp8")
    assert scheme is not None and "input_scale" in scheme.unused
    assert fp8.scheme(Q, {"weight", "weight_scale"}) is None
    rows = read_quantisation({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0})
    assert rows.scheme(Q, {"weight", "weight_scale"}) == Fp8(blocks=CHANNEL, activations="fp8")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 4}, r"quant_method = None is not supported; supported: awq, gptq"),
        ({"quant_method": "bitsandbytes"}, "quant_method = 'bitsandbytes' is not supported"),
        (changed(AWQ, version="gemv"), "version = 'gemv' is not supported, only gemm"),
        (changed(AWQ, backend="llm-awq"), "backend = 'llm-awq' is not supported"),
        (changed(AWQ, zero_point=False), "zero_point = False is not supported"),
        (changed(AWQ, bits=3), "bits = 3"),
        (changed(AWQ, group_size=0), "group_size = 0 is not supported"),
        (changed(AWQ, smooth=1), "does not know .*smooth = 1"),
        (changed(AWQ, modules_to_not_convert="q"), "modules_to_not_convert = 'q' is not a list"),
        (changed(GPTQ, bits=3), "bits = 3 is not supported, only 2, 4 and 8"),
        (changed(GPTQ, checkpoint_format="marlin"), "checkpoint_format = 'marlin'"),
        (changed(GPTQ, pack_dtype="int8"), "pack_dtype = 'int8' is not supported"),
        (changed(GPTQ, dynamic={"-:(": {}}), "'\\(' is no regular expression"),
        (changed(GPTQ, dynamic={".*": {"adapter": 1}}), "does not know .*adapter = 1"),
        (changed(FP8, fmt="e5m2"), "fmt = 'e5m2' is not supported"),
        (changed(FP8, weight_block_size=[128]), "weight_block_size = .128. is not two"),
        (changed(FP8, activation_scheme="token"), "activation_scheme = 'token'"),
        (changed(W4A16, format="marlin-24"), "format = 'marlin-24' is not supported; supported"),
        (changed(W4A16, quantization_status="calibration"), "quantization_status"),
        (changed(W4A16, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config: form"),
        (changed(W4A16, transform_config={"config_groups": {"u": {}}}), "transform_config"),
        (changed(W4A16, config_groups={}), "config_groups has no targets"),
        (changed(W4A16, config_groups={"W4A16": ["Linear"]}), "W4A16 must be an object"),
        (changed(W4A16, ignore=["re:["]), "'\\[' is no regular expression"),
        (with_weights(num_bits=3), "num_bits = 3"),
        (with_weights(type="float"), "type = float, num_bits = 4"),
        (with_weights(dynamic=True), "dynamic = True is not supported"),
        (with_weights(strategy="token"), "strategy = token"),
        (with_weights(strategy="group", group_size=None), "strategy = group with group_size = No"),
        (with_weights(codebook=1), "does not know .*codebook = 1"),
    ],
)
def test_refuses_by_name(config, message):
    with pytest.raises(ConfigError, match=message):
        read_quantisation(config)


def test_unknown_keys_can_be_allowed():
    read_quantisation(changed(AWQ, smooth=1), allow_unknown=True)
    with pytest.raises(ConfigError, match="version"):
        read_quantisation(changed(AWQ, version="gemv"), allow_unknown=True)


def test_refuses_activations_of_four_bits():
    config = copy.deepcopy(W4A16)
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 4, "type": "int"}
    with pytest.raises(ConfigError, match="input_activations: type = int, num_bits = 4"):
        read_quantisation(config)


def paths_of(value, path=()):
    """Every place in a configuration, nested ones too."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield (*path, key)
            yield from paths_of(inside, (*path, key))


@pytest.mark.parametrize("config", [AWQ, GPTQ, W4A16, FP8], ids=lambda c: c["quant_method"])
def test_any_value_is_taken_or_refused(config):
    for path in paths_of(config):
        for junk in (None, -5, 2.5, 10**12, "re:(", True, [], [1], ["a"], {}, {"a": {"a": 1}}):
            broken = copy.deepcopy(config)
            at = broken
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = junk
            with contextlib.suppress(ConfigError):
                read_quantisation(broken)
