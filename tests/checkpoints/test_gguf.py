import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from jaxserve.checkpoints.gguf_file import GgufFile
from jaxserve.checkpoints.load import open_checkpoint
from jaxserve.checkpoints.names import num_parameters
from jaxserve.core.errors import CheckpointError, ConfigError
from jaxserve.models.config import RopeScaling
from jaxserve.models.config_readers import from_preset


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
    factors[3] += 0.5
    path, _ = make_gguf("llama", Kind.F32, extra=[("rope_freqs.weight", factors)])
    with pytest.raises(ConfigError, match="rope_freqs"):
        open_checkpoint(path)


@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_demo_models_fit_their_presets(request, model):
    path = request.getfixturevalue(f"{model}_gguf")
    checkpoint = open_checkpoint(path)
    preset = from_preset({"smollm2": "smollm2-135m", "gemma3": "gemma3-270m"}[model])
    for field in preset.__dataclass_fields__.keys() - {"name"}:
        assert getattr(checkpoint.config, field) == getattr(preset, field), field
    assert num_parameters(checkpoint.config) == num_parameters(preset)
    assert checkpoint.read("layers.1.qkv").shape[-1] == preset.hidden_size
