import json

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from jaxserve.checkpoints.gguf_file import GgufFile
from jaxserve.checkpoints.load import open_checkpoint
from jaxserve.core.errors import CheckpointError, ConfigError
from jaxserve.models.config import RopeScaling
from jaxserve.models.config_readers import config_from_dict, config_to_dict, from_preset
from jaxserve.models.layers import rope_frequencies
from jaxserve.models.registry import num_parameters


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q5_0])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_reads_every_parameter(make_gguf, family, kind):
    path, expected = make_gguf(family, kind)
    checkpoint = open_checkpoint(path)
    assert checkpoint.names == set(expected)
    for name, value in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, value, err_msg=name)
    assert checkpoint.tokenizer_path == path


def test_directory_with_one_gguf(make_gguf):
    path, _ = make_gguf("llama", Kind.F32)
    assert open_checkpoint(path.parent).tokenizer_path == path


def test_large_tensor_in_parts(tmp_path):
    """A tensor of several parts, the last one not full, reads as the gguf package reads it."""
    x = np.random.default_rng(0).standard_normal((700, 224), np.float32)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_array("list", ["a", "é", ""])
    writer.add_array("numbers", [1, -2])
    writer.add_tensor("x", gguf.quants.quantize(x, Kind.Q8_0), raw_dtype=Kind.Q8_0)
    for step in ("header", "kv_data"):
        getattr(writer, f"write_{step}_to_file")()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "x.gguf")
    (tensor,) = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_array_equal(file.read("x"), expected)
    assert file.metadata["list"] == ["a", "é", ""]
    assert file.metadata["numbers"] == (1, -2)


def test_every_truncation_is_an_error(make_gguf):
    path, _ = make_gguf("llama", Kind.Q8_0)
    data = path.read_bytes()
    for end in [0, 3, 4, 8, 20, *range(24, 4000, 97), len(data) - 64]:
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_not_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        open_checkpoint(tmp_path / "x.gguf")


def test_unused_tensor(make_gguf):
    path, _ = make_gguf("llama", Kind.F32, extra=[("blk.0.attn_q.bias", np.ones(64, np.float32))])
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.bias has no place"):
        open_checkpoint(path)


def llama3_factors(theta: float, head_dim: int) -> np.ndarray:
    """As llama.cpp's converter computes them for Llama 3.1 (factor 8)."""
    factors = []
    for freq in 1 / theta ** (np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / freq
        if wavelength < 8192 / 4:
            factors.append(1)
        elif wavelength > 8192:
            factors.append(8)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    return np.array(factors, np.float32)


def test_llama3_rope_factors(make_gguf):
    factors = llama3_factors(10000.0, 16)
    assert len(set(factors.tolist())) > 2
    path, _ = make_gguf("llama", Kind.F32, extra=[("rope_freqs.weight", factors)])
    assert open_checkpoint(path).config.rope_scaling == RopeScaling(kind="llama3", factor=8.0)


def test_other_rope_factors_are_taken_as_they_are(make_gguf):
    """Of another original context than Llama 3's, say: llama.cpp divides by them, too."""
    factors = np.array([1, 1, 1, 1.5, 2, 3, 4, 4], np.float32)
    path, _ = make_gguf("llama", Kind.F32, extra=[("rope_freqs.weight", factors)])
    config = open_checkpoint(path).config
    scaling = config.rope_scaling
    assert scaling == RopeScaling(kind="divisors", factor=4.0, divisors=tuple(factors.tolist()))
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    plain = rope_frequencies(16, 10000.0, None)
    np.testing.assert_allclose(rope_frequencies(16, 10000.0, scaling), plain / factors, rtol=1e-6)
    for wrong in (factors[:5], -factors):
        path, _ = make_gguf("llama", Kind.F32, extra=[("rope_freqs.weight", wrong)])
        with pytest.raises(ConfigError, match=r"rope_freqs|5 rope frequencies"):
            open_checkpoint(path)


def split_gguf(path, parts):
    """Cut a file into `parts` as llama.cpp does: all metadata in the first, tensors in each."""
    reader = gguf.GGUFReader(path)
    tensors = list(reader.tensors)
    size = -(-len(tensors) // parts)
    paths = []
    for number in range(parts):
        paths.append(path.with_name(f"{path.stem}-{number + 1:05}-of-{parts:05}.gguf"))
        writer = gguf.GGUFWriter(paths[-1], "llama")
        for field in reader.fields.values() if number == 0 else ():
            if not field.name.startswith(("GGUF.", "general.architecture")):
                writer.add_key_value(field.name, field.contents(), field.types[0])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        for tensor in tensors[number * size : (number + 1) * size]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    path.unlink()
    return paths


def test_split_file_is_read_whole_given_any_part(make_gguf):
    path, expected = make_gguf("llama", Kind.Q8_0)
    parts = split_gguf(path, 3)
    for given in (*parts, path.parent):
        checkpoint = open_checkpoint(given)
        assert checkpoint.names == set(expected)
        assert checkpoint.tokenizer_path == parts[0]
    for name, value in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name), value, err_msg=name)
    parts[1].unlink()
    for given in (parts[0], path.parent):
        with pytest.raises(CheckpointError, match=r"no file llama-Q8_0-00002-of-00003\.gguf"):
            open_checkpoint(given)
    parts[0].rename(path)
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        open_checkpoint(path)


def test_directory_with_several_models(make_gguf):
    path, _ = make_gguf("llama", Kind.F32)
    (path.parent / "mmproj-x.gguf").write_bytes(b"a vision part")
    assert open_checkpoint(path.parent).tokenizer_path == path
    (path.parent / "other.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="2 GGUF files; name one of them: llama-F32"):
        open_checkpoint(path.parent)


def test_stored_output_beside_gemma_is_used(make_gguf):
    """Gemma ties its embeddings, but a file may have another output projection all the same."""
    output = np.ones((41, 64), np.float32)
    path, _ = make_gguf("gemma3_text", Kind.F32, extra=[("output.weight", output)])
    checkpoint = open_checkpoint(path)
    assert not checkpoint.config.tie_embeddings
    np.testing.assert_array_equal(checkpoint.read("lm_head"), output)


@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_demo_models_fit_their_presets(request, model):
    path = request.getfixturevalue(f"{model}_gguf")
    checkpoint = open_checkpoint(path)
    preset = from_preset({"smollm2": "smollm2-135m", "gemma3": "gemma3-270m"}[model])
    for field in preset.__dataclass_fields__.keys() - {"name"}:
        assert getattr(checkpoint.config, field) == getattr(preset, field), field
    assert num_parameters(checkpoint.config) == num_parameters(preset)
    assert checkpoint.read("layers.1.qkv").shape[-1] == preset.hidden_size
