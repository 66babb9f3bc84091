"""Weights held as their checkpoint has them, and floating ones quantised while they are read."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file, save_file

from jaxserve.checkpoints.load import load_params, open_checkpoint
from jaxserve.checkpoints.orbax import write_orbax
from jaxserve.checkpoints.storage import NAMED, formats_of, named, stored
from jaxserve.cli.main import main
from jaxserve.core.errors import ConfigError
from jaxserve.models.graph import ModelGraph
from jaxserve.models.shard import shard_model
from jaxserve.models.weights import Parts, dense
from jaxserve.parallel.mesh import make_mesh
from jaxserve.tokenizers.loading import load_tokenizer
from pallas_kernels.weights import Format, Quantised

Q8_0, Q4_1 = Format("int8", 32, "float16"), Format("int4", 32, "float16", True)


def load(checkpoint, storage_of, mesh=""):
    """Load: (the model's graph, how weights are held, the weights)."""
    model, rules = shard_model(checkpoint.config, make_mesh(mesh))
    graph = ModelGraph(model)
    storage = storage_of(graph.parameters, rules)
    targets = graph.abstract_params(rules, np.dtype(np.float32), storage)
    params = load_params(checkpoint, targets, progress=False)
    for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(targets), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (wanted.shape, wanted.dtype,
                                                           wanted.sharding)  # fmt: skip
    return graph, storage, params


def numbers(graph, name, weight):
    """What a weight stands for, in one array."""
    parts = weight.parts if isinstance(weight, Parts) else [weight]
    return graph.parameters[name].join([np.asarray(dense(part)) for part in parts])


@pytest.mark.parametrize("mesh", ["", "tensor=2"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_a_files_own_numbers(make_gguf, family, mesh):
    path, expected = make_gguf(family, Kind.Q8_0, kinds={"attn_v": Kind.Q4_1, "ffn_up": Kind.F16})
    checkpoint = open_checkpoint(path)
    graph, storage, params = load(
        checkpoint, lambda parameters, rules: stored(checkpoint, parameters, rules), mesh
    )
    assert storage["layers.1.qkv"] == (Q8_0, Q8_0, Q4_1)
    assert storage["layers.0.gate_up"] == (Q8_0, None)
    assert storage["embed"] == (Q8_0,) and isinstance(params["embed"], Quantised)
    assert "final_norm" not in storage
    # 32 inputs of each half of `o` are a group; those of `down`, 48, would be cut.
    assert "layers.0.o" in storage and ("layers.0.down" in storage) == (mesh == "")
    assert formats_of(storage) == [Q4_1, Q8_0]
    for name, value in expected.items():
        np.testing.assert_array_equal(numbers(graph, name, params[name]), value)


def test_what_a_mesh_would_cut_is_said(make_gguf, caplog):
    checkpoint = open_checkpoint(make_gguf("llama", Kind.Q8_0)[0])
    load(checkpoint, lambda parameters, rules: stored(checkpoint, parameters, rules), "tensor=2")
    assert "2 weights, such as layers.0.down, are held as arrays" in caplog.text


def test_kv_heads_are_repeated_in_quantised_weights(make_gguf):
    path, expected = make_gguf("qwen2", Kind.Q8_0)
    checkpoint = open_checkpoint(path)
    _, _, params = load(
        checkpoint, lambda parameters, rules: stored(checkpoint, parameters, rules), "tensor=4"
    )
    qkv, old = np.asarray(dense(params["layers.0.qkv"])), expected["layers.0.qkv"]
    assert qkv.shape == (4, 3, 16, 64)
    for head in range(4):
        np.testing.assert_array_equal(qkv[head], old[head // 2, [head % 2, -2, -1]])


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_quantised_while_read(make_hf, make_gguf, name, kind):
    if kind == "hf":
        path, expected = make_hf("llama", even=True)
    else:
        path, expected = make_gguf("llama", Kind.Q8_0)
    checkpoint = open_checkpoint(path)
    graph, storage, params = load(
        checkpoint, lambda parameters, rules: named(name, parameters, rules)
    )
    tables = NAMED["int8" if name == "int4" else name]
    assert {storage.pop(table) for table in ("embed", "lm_head")} == {(tables,)}
    assert formats_of(storage) == [NAMED[name]]
    for key, value in expected.items():
        if graph.parameters[key].kind == "weight":
            assert isinstance(params[key], Quantised)
            error = np.abs(numbers(graph, key, params[key]) - value)
            assert 0 < error.max() < {"int8": 0.03, "int4": 0.7, "fp8": 0.3}[name]
        else:
            np.testing.assert_array_equal(params[key], value)


def test_what_cannot_be_quantised_is_refused(make_hf):
    config = open_checkpoint(make_hf("llama")[0]).config  # of 22 inputs
    model, rules = shard_model(config, make_mesh(""))
    with pytest.raises(ConfigError, match=r"int4 cannot hold .*a multiple of 32 inputs"):
        named("int4", ModelGraph(model).parameters, rules)


def test_a_quantised_hugging_face_checkpoint(make_hf):
    """Two of a layer's three projections in fp8; the third stays as it is."""
    path, expected = make_hf("qwen2", even=True)
    file = path / "model.safetensors"
    tensors, numbers_of = load_file(file), {}
    for name in [n for n in tensors if n.endswith(("q_proj.weight", "k_proj.weight"))]:
        scale = np.float32(np.abs(tensors[name]).max() / 448)
        codes = (tensors[name] / scale).astype(ml_dtypes.float8_e4m3fn)
        tensors |= {name: codes, f"{name}_scale": np.array([scale])}
        numbers_of[name] = codes.astype(np.float32) * scale
    save_file(tensors, file)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (path / "config.json").write_text(json.dumps(config))

    checkpoint = open_checkpoint(path)
    graph, storage, params = load(
        checkpoint, lambda parameters, rules: stored(checkpoint, parameters, rules)
    )
    fp8 = Format("fp8")
    assert storage == {f"layers.{n}.qkv": (fp8, fp8, None) for n in range(2)}
    for n in range(2):
        found = numbers(graph, f"layers.{n}.qkv", params[f"layers.{n}.qkv"])
        q, k = (numbers_of[f"model.layers.{n}.self_attn.{x}_proj.weight"] for x in "qk")
        np.testing.assert_array_equal(found[:, :2].reshape(64, 64), q)
        np.testing.assert_array_equal(found[:, 2].reshape(32, 64), k)
        np.testing.assert_array_equal(found[:, 3], expected[f"layers.{n}.qkv"][:, 3])
    np.testing.assert_array_equal(
        checkpoint.read("layers.0.qkv"), numbers(graph, "layers.0.qkv", params["layers.0.qkv"])
    )


@pytest.mark.parametrize("mesh", ["", "tensor=2"])
@pytest.mark.parametrize("quantization", ["source", "int8"])
def test_a_converted_checkpoint(make_gguf, make_hf, tmp_path, mesh, quantization):
    """What `jaxserve convert` writes is what it read, quantised or not, and loads by shards."""
    path, expected = make_gguf("qwen2", Kind.Q8_0, kinds={"attn_v": Kind.Q4_1, "ffn_up": Kind.F16})
    source = open_checkpoint(path)

    def storage_of(parameters, rules):
        return (
            stored(source, parameters, rules)
            if quantization == "source"
            else named(quantization, parameters, rules)
        )

    _, storage, params = load(source, storage_of)
    save = load_tokenizer(make_hf("llama")[0]).save
    arrays = jax.tree.map(np.asarray, params)
    write_orbax(tmp_path / "o", source.config, arrays.items(), save)
    checkpoint = open_checkpoint(tmp_path / "o")
    for name, held in storage.items():
        assert checkpoint.formats(name) == held * (len(source.formats(name)) // len(held))
    graph, _, loaded = load(
        checkpoint, lambda parameters, rules: stored(checkpoint, parameters, rules), mesh
    )
    for name, weight in params.items():
        value = numbers(graph, name, weight)
        np.testing.assert_array_equal(numbers(graph, name, loaded[name]), value)
        np.testing.assert_array_equal(checkpoint.read(name), value)
        if quantization == "source":
            np.testing.assert_array_equal(value, expected[name])


def test_convert_quantises(make_hf, tmp_path):
    path, _ = make_hf("llama", even=True)
    result = CliRunner().invoke(
        main, ["convert", str(path), str(tmp_path / "o"), "--quantization", "int4"]
    )
    assert result.exit_code == 0, result.output
    checkpoint = open_checkpoint(tmp_path / "o")
    assert checkpoint.formats("layers.1.qkv") == (NAMED["int4"],) * 3
    assert checkpoint.formats("final_norm") == (None,)
