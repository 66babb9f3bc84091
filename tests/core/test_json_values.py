"""Walking through JSON values of any depth."""

import json

import pytest

from jaxserve.core.json_values import MAX_DEPTH, is_too_deep, num_chars


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_depth(opening: str):
    closing = "]" if opening == "[" else "}"

    def nested(depth: int) -> object:
        return json.loads(opening * depth + "1" + closing * depth)

    assert not is_too_deep(nested(MAX_DEPTH))
    assert is_too_deep(nested(MAX_DEPTH + 1))


def test_a_value_deeper_than_the_stack():
    value: list = []
    for _ in range(100_000):
        value = [value, "ab"]
    assert is_too_deep(value)
    assert num_chars(value) == 200_000
    while value:  # or freeing it would recurse
        value = value[0]


def test_characters():
    assert num_chars({"key": ["ab", 1, None, {"x": "c"}]}) == 3
    assert num_chars("abc") == 3
    assert num_chars(None) == 0
