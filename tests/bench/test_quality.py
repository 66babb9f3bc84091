"""Quality by format: figures that follow from what the sides foretell."""

import math
from pathlib import Path

import pytest

from jaxserve.bench.quality import default_text, measure_quality, side_options
from jaxserve.bench.settings import QualitySpec
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.llm import LLM
from jaxserve.testing.tiny_model import write_tiny_checkpoint


@pytest.mark.slow
def test_formats_of_a_tiny_model(tmp_path: Path, program_cache_dir: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "m", hidden_size=64, intermediate_size=96)
    config = EngineConfig(
        model=str(model), compilation_cache_dir=str(program_cache_dir), num_pages=32, page_size=8,
        max_num_seqs=2, max_num_batched_tokens=32,
    )  # fmt: skip
    spec = QualitySpec(num_tokens=190, window=32, sides=("none", "int8", "int4"))
    result = measure_quality(config, spec, LLM, progress=False)
    assert result.num_tokens == 6 * 31
    first, int8, int4 = (result.sides[side] for side in spec.sides)
    assert (first.perplexity_change, first.equal_tokens) == (0, 1)
    assert 1 < first.perplexity < math.inf
    assert 0 < abs(int8.perplexity_change) < abs(int4.perplexity_change) < 1
    assert 1 >= int8.equal_tokens > int4.equal_tokens > 0.3
    assert "help topics of Python" in str(result) and "100.00 %" in str(result)


def test_the_default_text_is_long_enough() -> None:
    assert len(default_text()[1]) > 400_000


def test_sides() -> None:
    assert side_options("int4:int8:bfloat16") == {
        "quantization": "int4", "activation_dtype": "int8", "kv_cache_dtype": "bfloat16",
    }  # fmt: skip
    assert side_options("auto") == {"quantization": "auto"}
    with pytest.raises(ConfigError, match="a side is quantization:activation_dtype"):
        side_options("a:b:c:d")


def test_sides_are_checked_before_the_first_is_built() -> None:
    with pytest.raises(ConfigError, match="quantization"):
        measure_quality(EngineConfig(), QualitySpec(sides=("none", "int9")), LLM)


def test_a_text_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"\xff")
    for path in (tmp_path / "t", tmp_path / "missing"):
        with pytest.raises(ConfigError, match="text cannot be read"):
            measure_quality(EngineConfig(), QualitySpec(text=path), LLM)
