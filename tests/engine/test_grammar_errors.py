"""What is wrong with a grammar is said in its author's words and places."""

import json

import pytest

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.grammar import Grammar
from jaxserve.engine.grammar_errors import MAX_MESSAGE_CHARS, explained
from jaxserve.engine.grammars import GrammarCompiler
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

COMPILER = GrammarCompiler(ByteTokenizer(), 272)
OF_SCHEMA = [
    ({"type": "foo"}, "Invalid type: foo"),
    ({"properties": {"x": {"minimum": "a"}}}, "a number is expected for 'minimum', got \"a\""),
    ({"properties": {"x": {"pattern": "a["}}}, "the pattern 'a[': unclosed character class"),
    ({"anyOf": []}, "no value fits the schema: anyOf is empty"),
    (
        {"$ref": "http://x/y"},
        "Resource 'http://x/y' is not part of the schema, and nothing is fetched",
    ),
]


def said(grammar: Grammar) -> str:
    with pytest.raises(InvalidRequest) as caught:
        COMPILER.compile(grammar)
    assert caught.value.param == "grammar"
    for internal in ("llguidance", "start:", "x-guidance", "whitespace", "\n"):
        assert internal not in str(caught.value)
    what, _, problem = str(caught.value).partition(" cannot be used: ")
    names = {"regex": "the regular expression", "lark": "the grammar", "json_schema": "the schema"}
    assert what == names[grammar.kind]
    return problem


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("(", "unclosed group at its character 1"),
        ("xa{2,1}", "invalid repetition count range, the start must be <= the end at its char"),
        ("a/b/[", "unclosed character class at its character 5"),  # slashes are escaped for Lark
        (r"\bx", r"look-around such as \b is not supported"),
        (r"a\1", "backreferences are not supported at its character 2"),
    ],
)  # fmt: skip
def test_regular_expressions(source: str, problem: str) -> None:
    assert said(Grammar("regex", source)).startswith(problem)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("start: foo", 'line 1, column 8: unknown name: "foo"'),
        ("start: A\nA: B\nB: A", 'line 3, column 4: circular reference in token "A" definition'),
        ('start: "', "line 1, column 9: this cannot be read; maybe a string or a"),
        ('start: "a"\nfoo: | )', "line 2, column 8: expecting rule, token or statement"),
        ('s: "a"', "no start rule found"),
        ('start: %json {"type": "foo"}', "a schema in it: Invalid type: foo"),
        ('root ::= "yes" | (', "line 1, column 19: Expected ')'"),
        ('root ::= "a"\n\nb ::= "\\q"', "line 3, column 9: Invalid escape sequence \\q"),
        ('root ::= "yes" | foo', "Rule 'foo' not found"),
    ],
)  # fmt: skip
def test_grammars(source: str, problem: str) -> None:
    assert said(Grammar("lark", source)).startswith(problem)


@pytest.mark.parametrize(("schema", "problem"), OF_SCHEMA)
def test_schemas(schema: dict, problem: str) -> None:
    assert said(Grammar("json_schema", json.dumps(schema))) == problem


def test_long_and_unknown_messages() -> None:
    assert len(explained("lark", "", "x" * 10_000)) == MAX_MESSAGE_CHARS + 3
    assert explained("lark", "a", "at 9(1): odd") == "at its end: odd"
    assert explained("regex", "a", "odd\n<state>\nsecrets") == "odd"
    assert explained("lark", "", "NoExtensionBias") == "no text fits it"
