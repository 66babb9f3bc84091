"""Answers are judged by what of their schema no grammar enforces."""

import asyncio
import json
from typing import Any

import pytest

from jaxserve.core.grammar import Grammar
from jaxserve.core.json_schema import left_out
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.server.answers import stream_answers
from jaxserve.server.context import ServerContext
from jaxserve.server.metrics.endpoint import Metrics
from jaxserve.server.schema_check import broken_rule
from jaxserve.testing.fake_engine import fake_engine
from jaxserve.testing.fake_executor import FakeModel

PAIRS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2,
         "maxItems": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "good", "bad", "keyword"),
    [
        ({**PAIRS, "uniqueItems": True}, [1, 2], [1, 1], "uniqueItems"),
        ({"not": {"type": "integer"}}, "a", 1, "not"),
        ({"if": {"type": "integer"}, "then": {"minimum": 3}}, 3, 2, "if"),
        ({"type": "array", "contains": {"const": 1}}, [1, 2], [2], "contains"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, {}, {"a": 1}, "dependentRequired"),
        ({"type": "string", "pattern": "^(?!a)"}, "b", "a", "pattern"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, 1.5, 1, "oneOf"),
        ({"properties": {"x": {"not": {"const": 1}}}}, {"x": 2}, {"x": 1}, "properties.x.not"),
    ],
)
def test_what_is_left_out_is_found(schema: Any, good: Any, bad: Any, keyword: str) -> None:
    assert left_out(schema)[0].startswith(keyword)
    assert broken_rule(schema, good) is None
    assert (broken_rule(schema, bad) or "").startswith((keyword, "then"))


def test_schemas_that_are_no_help_judge_nothing() -> None:
    assert left_out({"type": "integer", "minimum": 3}) == []
    assert broken_rule({"$ref": "http://localhost:1/schema"}, 1) is None  # nothing is fetched
    assert broken_rule({"type": "nonsense"}, 1) is None
    assert broken_rule({"type": "string", "pattern": "(?=a)(a|a)*c"}, "a" * 200)  # in no time
    deep = {"properties": {"x" * 1000: {"not": {}}}}
    assert len(broken_rule(deep, {"x" * 1000: 1}) or "") == 300


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize("unique", [False, True])
def test_answers_that_do_not_fit_are_logged_and_counted(
    caplog: pytest.LogCaptureFixture, is_strict: bool, unique: bool
) -> None:
    schema = {**PAIRS, "uniqueItems": unique}
    if unique and is_strict:
        return  # refused; see tests/core/test_json_schema.py

    context = ServerContext()
    engine = fake_engine(model=FakeModel(vocab_size=258))

    async def main() -> list[str]:
        context.engine = engine
        grammar = Grammar("json_schema", json.dumps(schema), is_strict=is_strict)
        params = SamplingParams(grammar=grammar, max_tokens=60, seed=0)
        texts = [""] * 24
        answers = stream_answers(
            context, engine, "r", [[1]], params, ServiceParams(), n=24, asks_max_tokens=True
        )
        async for index, delta in answers:
            texts[index] += delta.text
        totals = context.observability.metrics.totals
        assert totals is not None
        assert totals.counts["schema_mismatches"] == len(caplog.messages)
        return texts

    try:
        lists = [json.loads(text) for text in asyncio.run(main())]
    finally:
        engine.shutdown()
    num_double = sum(len(set(each)) < 2 for each in lists)
    assert 0 < num_double < len(lists), "no test of anything"
    assert len(caplog.messages) == (num_double if unique else 0)
    assert all("request r: an answer breaks its schema's uniqueItems" in m for m in caplog.messages)


def test_nothing_is_counted_before_there_is_an_engine() -> None:
    Metrics().count_mismatch()
