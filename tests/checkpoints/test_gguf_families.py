"""Every family's GGUF files hold what its Hugging Face files hold, under llama.cpp's names."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

from jaxserve.checkpoints.load import open_checkpoint
from jaxserve.testing.tiny_model import write_tiny_checkpoint
from pallas_kernels.weights import Quantised

ARCHITECTURES = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 96}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0]}
# By model type: the architecture, whether its converter puts rotated rows in interleaved order,
# other entries of config.json.
FAMILIES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "qwen3": ("qwen3", False, {}),
    "smollm3": ("smollm3", True, {}),
    "granite": ("granite", True, {}),
    "olmo2": ("olmo2", False, {}),
    "gemma2": ("gemma2", False, {}),
    "phi3": ("phi3", False, {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64}),
    "glm4": ("glm4", False, {}),
    "cohere2": ("cohere2", False, {}),
    "starcoder2": ("starcoder2", False, {}),
}


def interleaved(x: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head, i and i + head_dim / 2 side by side, as llama.cpp's converter has them."""
    return x.reshape(-1, 2, head_dim // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_gguf(source: Path, model_type: str, kind: Kind) -> Path:
    """The checkpoint as one GGUF file, its matrices of one type."""
    architecture, is_interleaved, _ = FAMILIES[model_type]
    config = open_checkpoint(source).config
    path = source.with_suffix(".gguf")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_model_len)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.rotated)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    if config.rope_scaling is not None:
        writer.add_rope_scaling_orig_ctx_len(64)
        for name in ("long", "short"):
            factors = np.array(LONGROPE[f"{name}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_layers)
    for name, x in load_file(source / "model.safetensors").items():
        if is_interleaved and ("q_proj" in name or "k_proj" in name):
            x = interleaved(x, config.head_dim)
        if architecture == "gemma2" and "norm" in name:
            x = x + 1
        target = names.get_name(name, (".weight", ".bias"))
        assert target is not None
        own = kind if x.ndim == 2 else Kind.F32
        writer.add_tensor(target, quantize(x, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("model_type", FAMILIES)
def test_parameters_are_those_of_the_hugging_face_file(model_type: str, tmp_path: Path):
    changes = FAMILIES[model_type][2]
    source = write_tiny_checkpoint(tmp_path / model_type, family=model_type, **{**SIZES, **changes})
    expected, got = (
        open_checkpoint(source),
        open_checkpoint(write_gguf(source, model_type, Kind.F32)),
    )
    assert got.names == expected.names
    for name in expected.names:
        np.testing.assert_array_equal(got.read(name), expected.read(name), name)
    assert got.config.rope_kinds == expected.config.rope_kinds
    assert got.config.rotated == expected.config.rotated
    scaling, wanted = got.config.rope_scaling, expected.config.rope_scaling
    assert (scaling is None) == (wanted is None)
    if scaling and wanted:
        assert scaling.short_divisors == wanted.short_divisors
        assert got.config.for_context(64).rope_scaling != scaling


def test_fused_tensors_stay_quantised(tmp_path: Path):
    """Each part takes its rows of the tensor, in the file's own numbers."""
    source = write_tiny_checkpoint(tmp_path / "phi3", family="phi3", **SIZES)
    expected = open_checkpoint(source)
    got = open_checkpoint(write_gguf(source, "phi3", Kind.Q8_0))
    for name in ("layers.1.qkv", "layers.1.gate_up"):
        parts, dense = got.read_parts(name), expected.parameters[name].split(expected.read(name))
        for part, values in zip(parts, dense, strict=True):
            assert isinstance(part, Quantised)
            rows = values.reshape(-1, values.shape[-1])
            rounded = dequantize(quantize(rows, Kind.Q8_0), Kind.Q8_0)
            np.testing.assert_array_equal(part.dequantise(), rounded.reshape(values.shape))
