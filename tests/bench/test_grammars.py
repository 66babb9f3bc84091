"""Answers under random JSON schemas: every finished one parses and fits its schema."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from jaxserve.bench.grammars import measure_grammars, schema_judge
from jaxserve.bench.random_schemas import SchemaSource
from jaxserve.bench.settings import GrammarSpec
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.engine.engine import Engine
from jaxserve.testing.fake_engine import fake_sync_engine
from tests.bench.test_bench_cli import invoke

# Room for all at once, or so little that requests are preempted all the time.
ROOM: dict[str, Any] = dict(
    max_model_len=3000, page_size=64, num_pages=3000, max_num_batched_tokens=2048,
    max_num_seqs=32, step_seconds=0.0,
)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"num_pages": 48}, {"overlap": False}])
def test_every_finished_answer_fits_its_schema(options: dict[str, Any]):
    """The engine's sampler draws letters by a hash: as hostile to a schema as a model can be."""
    engine = fake_sync_engine(**(ROOM | options))
    spec = GrammarSpec(num_schemas=24, max_tokens=400, max_depth=2, rounds=2, seed=len(options))
    result = measure_grammars(engine, spec, schema_judge(), progress=False)
    assert result.invalid == [] and result.refused == 0
    assert result.valid == result.parsed == result.finished > 15
    assert result.finished + result.cut == 24
    assert result.with_grammars.output_tokens == result.without.output_tokens
    if "num_pages" in options:
        assert engine.load().num_preemptions > 0
    assert "100.00 %" in str(result)


def test_an_answer_that_does_not_fit_is_seen():
    engine = fake_sync_engine(**ROOM)
    spec = GrammarSpec(num_schemas=8, max_tokens=300, max_depth=1, rounds=1)
    result = measure_grammars(engine, spec, lambda schema, instance: False, progress=False)
    assert result.valid == 0 and len(result.invalid) == result.finished > 0


def test_the_schemas_are_schemas_and_differ():
    source = SchemaSource(3)
    schemas = [source.draw() for _ in range(200)]
    for schema in schemas:
        jsonschema.Draft202012Validator.check_schema(schema)
    texts = {json.dumps(schema) for schema in schemas}
    assert len(texts) == 200
    for keyword in (
        "anyOf", "$ref", "prefixItems", "pattern", "format", "enum", "const", "multipleOf",
        "exclusiveMinimum", "maxItems", "maxLength", "additionalProperties",
    ):  # fmt: skip
        assert any(f'"{keyword}"' in text for text in texts), keyword
    assert SchemaSource(3).draw() == schemas[0]


def test_numbers_are_checked():
    with pytest.raises(ConfigError, match="num_schemas must be positive"):
        GrammarSpec(num_schemas=0)


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    built: list[EngineConfig] = []

    def build(config: EngineConfig, progress: bool) -> Engine:
        built.append(config)
        return fake_sync_engine(**ROOM)

    monkeypatch.setattr("jaxserve.engine.build.build_sync_engine", build)
    arguments = ["grammars", "m", "--num-schemas", "12", "--max-depth", "1", "--rounds", "1"]
    path = tmp_path / "out.json"
    result = invoke(*arguments, "--disable-tqdm", "--output-json", str(path))
    assert result.exit_code == 0, result.output
    assert "100.00 %" in result.output and "throughput with grammars" in result.output
    assert json.loads(path.read_text())["num_schemas"] == 12
    assert not built[0].prefix_cache and built[0].max_waiting >= 12
    monkeypatch.setattr("jaxserve.bench.grammars.schema_judge", lambda: lambda *_: False)
    assert invoke(*arguments, "--disable-tqdm").exit_code == 1
