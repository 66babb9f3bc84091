"""What families declare of GGUF files, against llama.cpp's own table of tensors."""

import gguf
import numpy as np
import pytest

from jaxserve.models.config_readers import from_preset, preset_names
from jaxserve.models.parameters import interleaved_to_halves
from jaxserve.models.registry import FAMILIES, family_of

ARCHITECTURES = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}


def test_every_family_has_a_preset():
    assert {family_of(from_preset(name)).name for name in preset_names()} == {*FAMILIES}


@pytest.mark.parametrize("preset", ["mistral-nemo-12b", *(
    "qwen2.5-7b", "qwen3-8b", "smollm3-3b", "granite-3.1-8b", "olmo2-7b", "gemma2-2b",
    "gemma3-270m", "phi-4", "glm4-9b", "command-r-35b", "starcoder2-3b",
)])  # fmt: skip
def test_tensors_of_both_formats_are_each_others(preset: str):
    """Piece by piece: the tensor of one format is called what llama.cpp calls that of the other."""
    config = from_preset(preset)
    family = family_of(config)
    for architecture in family.gguf:
        names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_layers)
        for parameter in family.parameters(config).values():
            for hf, other in zip(parameter.sources["hf"], parameter.sources["gguf"], strict=True):
                assert names.get_name(hf.tensor, (".weight", ".bias")) == other.tensor
                assert hf.shape == other.shape


def test_part_of_each_head_is_taken_apart():
    """Rows 2i and 2i + 1 of the first six of ten come to lie three apart, the rest stays."""
    rows = np.arange(20)
    halves = interleaved_to_halves(rows, 10, 6)
    assert halves.tolist() == [0, 2, 4, 1, 3, 5, 6, 7, 8, 9, 10, 12, 14, 11, 13, 15, 16, 17, 18, 19]
