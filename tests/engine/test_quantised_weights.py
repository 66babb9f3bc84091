"""Engines whose weights are quantised, against engines of the numbers that they stand for."""

from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.core.errors import ConfigError
from jaxserve.testing.tiny_model import write_tiny_checkpoint
from pallas_kernels.weights import quantise
from tests.engine.harness import build, greedy, prompts, run

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
OPTIONS = {"num_pages": 64, "page_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16}


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """(a tiny checkpoint, one of the numbers that its int8 weights stand for)."""
    from jaxserve.checkpoints.storage import NAMED

    plain = write_tiny_checkpoint(tmp_path_factory.mktemp("plain"), seed=1, **SIZES)
    other = write_tiny_checkpoint(tmp_path_factory.mktemp("rounded"), seed=1, **SIZES)
    tensors = load_file(other / "model.safetensors")
    for name, value in tensors.items():
        if value.ndim == 2:
            tensors[name] = quantise(value, NAMED["int8"]).dequantise()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return plain, other


@pytest.mark.parametrize("mesh", ["", "data=2,tensor=2"])
def test_int8_weights(rounded, program_cache_dir, mesh):
    plain, other = rounded
    requests = [(prompt, greedy(12)) for prompt in prompts(6, 20)]
    answers = []
    for path, quantization in ((plain, "int8"), (other, "none")):
        engine = build(
            path, quantization=quantization, mesh=mesh,
            compilation_cache_dir=str(program_cache_dir), **OPTIONS,
        )  # fmt: skip
        answers.append([answer.token_ids for answer in run(engine, requests)])
    assert answers[0] == answers[1]


def test_int8_activations_need_codes(rounded):
    with pytest.raises(ConfigError, match="activation_dtype int8 takes weights of integer codes"):
        build(rounded[0], quantization="fp8", activation_dtype="int8", **OPTIONS)
