"""What is decided of an engine before it is made."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxserve.core.config import EngineConfig
from jaxserve.engine import blueprint
from jaxserve.testing.tiny_model import write_tiny_checkpoint


@pytest.mark.parametrize(
    ("given", "longest", "default", "said"),
    [
        ({}, 512, 8192, "requests of up to 512 tokens, what the model was made for"),
        ({}, 256, 256, "up to 256 tokens by default, of the 512 that the model was made for"),
        ({"num_pages": 8}, 32, 8192, "up to 32 tokens, of the 512 .*: what the KV cache holds"),
        ({"max_model_len": 100}, 100, 8192, "requests of up to 100 tokens$"),
    ],
)
def test_where_the_longest_request_comes_from_is_said(
    given: dict[str, Any],
    longest: int,
    default: int,
    said: str,
    tiny_model: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(blueprint, "DEFAULT_MAX_MODEL_LEN", default)
    caplog.set_level("INFO")
    options = {"page_size": 4, "max_num_batched_tokens": 16, "kv_cache_memory": 0.1, **given}
    plan = blueprint.draw_up(EngineConfig(model=str(tiny_model()), **options))
    assert plan.max_model_len == longest
    [line] = [text for text in caplog.messages if "requests of up to" in text]
    assert re.search(said, line)


def test_a_format_outside_its_bar_is_said(
    tiny_model: Callable[..., Path], caplog: pytest.LogCaptureFixture
):
    for kind, said in (("int8", 0), ("fp8", 1)):
        caplog.clear()
        blueprint.draw_up(
            EngineConfig(
                model=str(tiny_model()), quantization=kind, num_pages=8, page_size=4,
                max_num_batched_tokens=16,
            )
        )  # fmt: skip
        assert sum("may cost quality" in text for text in caplog.messages) == said


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("big-q4-00001-of-00003.gguf", "big-q4"),
        ("small.Q4_K_M.gguf", "small.Q4_K_M"),
        ("odd-1-of-2.gguf", "odd-1-of-2"),
    ],
)
def test_a_split_file_is_served_without_its_number(file: str, name: str, tmp_path: Path):
    path = tmp_path / file
    path.touch()
    assert blueprint.short_name(str(path)) == name
    assert blueprint.short_name(str(tmp_path)) == tmp_path.name
    assert blueprint.short_name("owner/name") == "owner/name"


@pytest.mark.parametrize(("max_model_len", "divisor"), [(64, 1.5), (65, 2.0)])
def test_longrope_goes_by_the_longest_request(max_model_len: int, divisor: float, tmp_path: Path):
    scaling = {"rope_type": "longrope", "long_factor": [2.0, 2.0], "short_factor": [1.5, 1.5]}
    model = write_tiny_checkpoint(
        tmp_path / "phi", family="phi3", rope_scaling=scaling, original_max_position_embeddings=64
    )
    plan = blueprint.draw_up(
        EngineConfig(
            model=str(model), max_model_len=max_model_len, page_size=4, max_num_batched_tokens=16,
            kv_cache_memory=0.1,
        )
    )  # fmt: skip
    assert plan.model.rope_scaling is not None
    assert plan.model.rope_scaling.divisors == (divisor, divisor)
    assert plan.lowering.program.graph.config == plan.model
