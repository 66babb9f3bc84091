import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.checkpoints.load import open_checkpoint
from jaxserve.core.errors import CheckpointError
from jaxserve.models.registry import parameter_shapes

FAMILIES = ("llama", "mistral", "qwen2", "gemma3_text")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_reads_every_parameter(make_hf, family, shards):
    path, expected = make_hf(family, shards=shards)
    checkpoint = open_checkpoint(path)
    assert checkpoint.names == set(expected)
    assert parameter_shapes(checkpoint.config) == {k: v.shape for k, v in expected.items()}
    for name, value in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name), value, err_msg=name)
    assert checkpoint.tokenizer_path == path


def test_keeps_bfloat16_but_not_gemmas_norms(make_hf, bfloat16):
    path, expected = make_hf("gemma3_text", dtype=bfloat16)
    checkpoint = open_checkpoint(path)
    for name, value in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == (np.float32 if name.endswith("norm") else bfloat16)
        np.testing.assert_array_equal(read, value)


def test_float16_widens(make_hf):
    path, expected = make_hf("llama", dtype=np.float16)
    read = open_checkpoint(path).read("layers.1.qkv")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, expected["layers.1.qkv"].astype(np.float32))


def test_vision_gemma_gives_its_text_part(make_hf):
    path, expected = make_hf("gemma3_text")
    text = json.loads((path / "config.json").read_text())
    outer = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}
    (path / "config.json").write_text(json.dumps(outer))
    tensors = load_file(path / "model.safetensors")
    renamed = {n.replace("model.", "language_model.model.", 1): x for n, x in tensors.items()}
    renamed["vision_tower.vision_model.x.weight"] = np.ones((3, 3), np.float32)
    save_file(renamed, path / "model.safetensors")
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.eos_token_ids == (1, 106)
    np.testing.assert_array_equal(checkpoint.read("layers.2.o"), expected["layers.2.o"])


def test_generation_config_adds_eos(make_hf):
    path, _ = make_hf("llama")
    (path / "generation_config.json").write_text('{"eos_token_id": [9, 2]}')
    assert open_checkpoint(path).config.eos_token_ids == (9, 2)


def change(path, edit):
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.*missing"),
        (lambda t: t.pop("model.embed_tokens.weight"), "embed_tokens.weight is missing"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(5, np.float32)}),
            r"model.norm.weight has shape \(5,\), expected \(22,\)",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": np.ones(5, np.float32)}),
            "o_proj.bias has no place",
        ),
    ],
)
def test_wrong_tensors(make_hf, edit, message):
    path, _ = make_hf("llama")
    change(path, edit)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn])
def test_types_that_are_not_weights(make_hf, dtype):
    path, _ = make_hf("llama")
    change(path, lambda t: t.update({"model.norm.weight": np.ones(22, dtype)}))
    with pytest.raises(CheckpointError, match=r"model.norm.weight has type (int8|float8_e4m3fn)"):
        open_checkpoint(path)


def change_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("shards", [1, 3])
def test_stored_lm_head_is_used_where_it_differs_from_a_tied_embedding(make_hf, shards, caplog):
    """As transformers does; bfloat16 and rows that are more than are compared at a time."""
    path, expected = make_hf("llama", shards=shards)
    change_config(path, tie_word_embeddings=True)
    checkpoint = open_checkpoint(path)
    assert not checkpoint.config.tie_embeddings
    np.testing.assert_array_equal(checkpoint.read("lm_head"), expected["lm_head"])
    assert "lm_head.weight is stored and differs" in caplog.text


def test_stored_lm_head_that_equals_a_tied_embedding_is_left_out(make_hf, bfloat16, monkeypatch):
    monkeypatch.setattr("jaxserve.checkpoints.safetensors.COMPARED_ROWS", 10)  # of 37
    path, _ = make_hf("llama", dtype=bfloat16)
    change_config(path, tie_word_embeddings=True)
    change(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.tie_embeddings
    assert "lm_head" not in checkpoint.names

    def differ_at_the_end(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][-1, -1] = 7

    change(path, differ_at_the_end)
    assert "lm_head" in open_checkpoint(path).names


def test_other_files_beside_the_weights(make_hf):
    """model.safetensors goes before an index, as in transformers; the rest is not looked at."""
    path, expected = make_hf("llama")
    for other in ("adapter_model.safetensors", "consolidated.safetensors"):
        save_file({"x": np.ones(3, np.float32)}, path / other)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "absent"}}')
    assert open_checkpoint(path).names == set(expected)
    (path / "model.safetensors.index.json").unlink()
    (path / "model.safetensors").rename(path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors, consolidated.*weights"):
        open_checkpoint(path)
    for other in ("adapter_model.safetensors", "consolidated.safetensors"):
        (path / other).unlink()
    assert open_checkpoint(path).names == set(expected)


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", 3])
def test_index_names_files_beside_it(make_hf, file):
    path, _ = make_hf("llama", shards=2)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(CheckpointError, match="no file beside it"):
        open_checkpoint(path)


def test_truncated_file(make_hf):
    path, _ = make_hf("llama")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="cannot read"):
        open_checkpoint(path)


def test_missing_shard(make_hf):
    path, _ = make_hf("llama", shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="00002-of-00003"):
        open_checkpoint(path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_bad_config_json(make_hf, content):
    path, _ = make_hf("llama")
    (path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(path)


def test_unknown_parameter(make_hf):
    path, _ = make_hf("llama")
    with pytest.raises(CheckpointError, match="no parameter nonsense"):
        open_checkpoint(path).read("nonsense")
