"""JSON schemas in the words that a grammar can enforce."""

import contextlib
import datetime
import decimal
import enum
import json
import pathlib
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.grammar import Grammar
from jaxserve.core.json_schema import FORMATS, enforceable_schema
from jaxserve.engine.grammars import GrammarCompiler
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

COMPILER = GrammarCompiler(ByteTokenizer(), 258)


def fitting(schema: dict[str, Any], texts: Sequence[str], *, is_strict: bool = False) -> list[str]:
    """Those texts that the schema's grammar allows."""
    grammar = Grammar("json_schema", json.dumps(schema), is_strict=is_strict)
    COMPILER.compile(grammar)

    def fits(text: str) -> bool:
        matcher = COMPILER.compile(grammar)._matcher
        return all(map(matcher.consume_token, text.encode())) and matcher.is_accepting()

    return [text for text in texts if fits(text)]


class Color(enum.Enum):
    RED, BLUE = "red", "blue"


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]


class Everything(pydantic.BaseModel):
    path: pathlib.Path
    secret: pydantic.SecretStr
    raw: bytes
    numbers: set[int]
    colors: frozenset[Color]
    by_name: Annotated[dict[Literal["a", "b"], int], pydantic.Field(max_length=2)]
    by_color: dict[Color, int]
    by_pattern: dict[Annotated[str, pydantic.Field(pattern="^x")], int]
    by_length: dict[Annotated[str, pydantic.Field(min_length=2)], int]
    price: decimal.Decimal
    id: uuid.UUID
    day: datetime.date
    moment: datetime.datetime
    span: datetime.timedelta
    url: pydantic.AnyUrl
    pet: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]
    pair: tuple[int, str]
    either: int | str | None
    text: pydantic.Json[Any]
    child: "Everything | None" = None


VALUE = {
    "path": "/a", "secret": "s", "raw": "b", "numbers": [1, 2], "colors": ["red", "blue"],
    "by_name": {"a": 1}, "by_color": {"blue": 2}, "by_pattern": {"xy": 3}, "by_length": {"ab": 4},
    "price": 1.5, "id": "f81d4fae-7dec-11d0-a765-00a0c91e6bf6", "day": "2024-02-29",
    "moment": "2024-02-29T01:02:03Z", "span": "P1D", "url": "https://a.example/",
    "pet": {"kind": "cat", "lives": 9}, "pair": [1, "a"], "either": None, "text": "1",
}  # fmt: skip


def test_pydantics_schemas() -> None:
    schema = Everything.model_json_schema()
    good = json.dumps({**VALUE, "child": VALUE})
    wrong = [
        {"by_name": {"c": 1}}, {"by_color": {"green": 1}}, {"by_length": {"a": 1}},
        {"colors": ["red", "red"]}, {"pet": {"kind": "cow"}},
    ]  # fmt: skip
    assert fitting(schema, [good, *(json.dumps(VALUE | w) for w in wrong)]) == [good]
    with pytest.raises(InvalidRequest, match=r"\$defs.Everything.properties.numbers.uniqueItems"):
        fitting(schema, [good], is_strict=True)


def test_formats() -> None:
    for name in ("path", "password", "binary", "uri-reference", "regex", "made-up"):
        assert fitting({"type": "string", "format": name}, ['"x"'], is_strict=True) == ['"x"']
    assert fitting({"type": "string", "format": "date"}, ['"x"', '"2024-01-01"']) == [
        '"2024-01-01"'
    ]
    for name in FORMATS:
        lark = f"start: %json {json.dumps({'type': 'string', 'format': name})}"
        assert not LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(lark))


BIG = 10**20


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"minimum": 2**53 + 1, "maximum": 2**53 + 3}, [2**53 + 2], [2**53, 2**53 + 4]),
        ({"minimum": 2**60, "exclusiveMaximum": 2**60 + 1}, [2**60], [2**60 + 1]),
        ({"minimum": -(2**63), "maximum": 2**63 - 1}, [2**63 - 1, -(2**62)], [2**63]),
        ({"minimum": 0, "maximum": 2**64}, [0, 2**62], [-1, 2**64 + 1]),
        ({"exclusiveMinimum": 1.5, "exclusiveMaximum": 3.5}, [2, 3], [1, 4]),
        ({"exclusiveMinimum": 1, "minimum": 3, "maximum": 4.9}, [3, 4], [2, 5]),
        ({"exclusiveMinimum": -2, "maximum": -1}, [-1], [-2, 0]),
        ({"minimum": 10, "multipleOf": 7}, [14], [7, 15]),
        ({"exclusiveMinimum": True, "minimum": 3}, [4], [3]),
    ],
)
def test_bounds_of_integers(schema: dict[str, Any], good: list[int], bad: list[int]) -> None:
    texts = [str(value) for value in good]
    given = {"type": "integer", **schema}
    assert fitting(given, [*texts, *map(str, bad)], is_strict=True) == texts


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "integer", "minimum": BIG, "maximum": BIG + 3}, "minimum and maximum"),
        ({"type": "integer", "minimum": 2**63}, "minimum"),
        ({"type": "integer", "maximum": -BIG}, "maximum"),
        ({"type": "number", "minimum": 1e21}, "minimum"),
        ({"type": "number", "maximum": -1e300}, "maximum"),
        ({"const": BIG}, str(BIG)),
        ({"enum": [1, 2**60 + 1]}, str(2**60 + 1)),
        ({"type": "integer", "multipleOf": BIG}, "multipleOf"),
        ({"properties": {"a": {"type": "integer", "minimum": BIG}}}, "properties.a.minimum"),
    ],
)
def test_numbers_out_of_reach_are_refused_by_name(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        fitting(schema, [])


def test_bounds_of_numbers_that_say_nothing() -> None:
    schema = {"type": "number", "minimum": -1e308, "maximum": 1e308}
    assert fitting(schema, ["-5.5", "1000000"], is_strict=True) == ["-5.5", "1000000"]


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "integer"}}, "not"),
        ({"if": {"type": "integer"}, "then": {"minimum": 3}}, "if"),
        ({"type": "array", "contains": {"const": 1}}, "contains"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "object", "propertyNames": {"format": "email"}}, "propertyNames"),
        ({"type": "string", "pattern": "^(?!a)"}, "pattern with look-around"),
        ({"properties": {"x": {"anyOf": [{"not": {}}]}}}, r"properties.x.anyOf\[0\].not"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"properties": {"a": {}, "b": {}}, "minProperties": 1}, "minProperties"),
        ({"properties": {"a": {}}, "allOf": [{"maxProperties": 2}]}, r"allOf\[0\].maxProperties"),
    ],
)
def test_what_no_grammar_enforces(schema: dict[str, Any], keyword: str) -> None:
    fitting(schema, ["1"])  # left to the caller to check
    with pytest.raises(InvalidRequest, match=keyword):
        fitting(schema, ["1"], is_strict=True)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "uniqueItems": False},
        {"type": "array", "uniqueItems": True, "maxItems": 1},
        {"type": "object", "propertyNames": {"type": "string"}},
        {"type": "object", "unevaluatedProperties": {}, "dependentRequired": {}},
        {"if": {"type": "integer"}, "minContains": 2},
        {"x-order": 1, "deprecated": True, "contentEncoding": "base64", "nullable": True},
    ],
)
def test_what_says_nothing_is_no_reason_to_refuse(schema: dict[str, Any]) -> None:
    fitting(schema, ["[]"], is_strict=True)


def test_names_and_sets_are_spelled_out() -> None:
    names = {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "required": ["a"]}
    texts = ['{"a": 1, "b": []}', '{"b": 1}', '{"a": 1, "c": 1}']
    assert fitting(names, texts, is_strict=True) == texts[:1]
    closed = {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False}
    assert fitting(closed, texts, is_strict=True) == []
    some = {"type": "array", "items": {"enum": [1, "a"]}, "uniqueItems": True, "minItems": 1}
    assert fitting(some, ["[]", "[1]", '[1, "a"]', "[1, 1]"], is_strict=True) == ["[1]", '[1, "a"]']


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"maxProperties": 2}, "0 a b ab"),
        ({"maxProperties": 1}, "0 a b"),
        ({"maxProperties": 0}, "0"),
        ({"minProperties": 1.0, "maxProperties": 2**70}, "a b ab"),
        ({"minProperties": 2, "maxProperties": 2}, "ab"),
        ({"minProperties": 1, "maxProperties": 1, "required": ["b"]}, "b"),
        ({"minProperties": 1, "maxProperties": 2, "required": ["a"]}, "a ab"),
        ({"maxProperties": 1, "required": ["a"], "additionalProperties": True}, "a"),
    ],
)
def test_properties_are_counted(fields: dict[str, Any], allowed: str) -> None:
    named = {"a": {"type": "integer"}, "b": {"type": "integer"}}
    schema = {"type": "object", "properties": named, "additionalProperties": False, **fields}
    texts = {"0": "{}", "a": '{"a": 1}', "b": '{"b": 1}', "ab": '{"a": 1, "b": 1}', "c": '{"c": 1}'}
    right = [texts[name] for name in allowed.split()]
    assert fitting(schema, list(texts.values()), is_strict=True) == right
    with pytest.raises(InvalidRequest, match="minProperties"):
        fitting(schema | {"minProperties": 3}, [])


def test_values_and_the_given_schema_are_left_alone() -> None:
    schema = {"const": {"format": "path", "not": 1}, "examples": [{"uniqueItems": True}]}
    assert enforceable_schema(schema, is_strict=True) == schema
    given = Everything.model_json_schema()
    enforceable_schema(given, is_strict=False)
    assert given == Everything.model_json_schema()
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(InvalidRequest, match="nested too deep"):
        enforceable_schema(deep, is_strict=False)


KEYWORDS = sorted({
    "type", "format", "enum", "const", "items", "prefixItems", "uniqueItems", "minItems",
    "maxItems",
    "properties", "patternProperties", "additionalProperties", "propertyNames", "minLength",
    "pattern", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "multipleOf", "anyOf", "oneOf", "not", "if", "then", "$ref", "$defs", "x-guidance", "contains",
    "unevaluatedProperties", "dependentRequired", "minContains", "required", "minProperties",
    "maxProperties", "allOf",
})  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.just(10**400),
    st.sampled_from(["integer", "number", "string", "array", "boolean", "#", "#/$defs/a", "(?=a)"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from([*KEYWORDS, "a"]), inner, max_size=5),
    ),
    max_leaves=12,
)


@example({"items": {"enum": [1]}, "uniqueItems": True, "minItems": "a"}, False)
@example({"items": {"enum": [1]}, "uniqueItems": True, "maxItems": None, "minItems": -3}, False)
@example({"type": 5, "minimum": 1}, False)
@example({"type": {"a": 1}, "minimum": 10**400}, False)
@example({"type": "number", "maximum": 10**400}, True)
@example({"type": "integer", "maximum": -(10**400)}, True)
@example({"properties": 3, "propertyNames": {"enum": ["a", [1]]}}, False)
@example({"propertyNames": {"minLength": "x"}}, True)
@example({"propertyNames": {"$ref": "#"}}, False)
@example({"$ref": "#", "items": {"$ref": "#/items"}, "uniqueItems": True}, False)
@example({"const": 10**400, "enum": 4}, False)
@example({"x-guidance": 3, "anyOf": 3, "$defs": [1], "format": []}, False)
@given(st.dictionaries(st.sampled_from(KEYWORDS), VALUES, max_size=8), st.booleans())
@settings(max_examples=100)
def test_nonsense_is_no_error_of_ours(schema: dict[str, Any], is_strict: bool) -> None:
    with contextlib.suppress(InvalidRequest):
        enforceable_schema(schema, is_strict=is_strict)
