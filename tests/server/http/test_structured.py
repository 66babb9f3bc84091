"""Structured output and log-probabilities, by the openai package."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pydantic
import pytest

from jaxserve.testing.fake_engine import fake_engine

USER: Any = [{"role": "user", "content": "hi"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "sizes": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["colour", "sizes"],
    "additionalProperties": False,
}


class Shape(pydantic.BaseModel):
    colour: bool
    round: bool


@pytest.fixture(scope="module")
def client(serve_in_a_thread) -> Iterator[openai.OpenAI]:
    engine = fake_engine()  # its model knows EOS, with which a grammar ends
    with (
        serve_in_a_thread(engine) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client
    engine.shutdown()


def test_json_schema(client: openai.OpenAI) -> None:
    named: Any = {"name": "thing", "schema": SCHEMA, "strict": True}
    chat: Any = client.chat.completions.create(
        model="fake", messages=USER, n=4, seed=1,
        response_format={"type": "json_schema", "json_schema": named},
    )  # fmt: skip
    for choice in chat.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    parsed = client.chat.completions.parse(model="fake", messages=USER, response_format=Shape)
    assert isinstance(parsed.choices[0].message.parsed, Shape)
    answer = client.responses.parse(model="fake", input="hi", text_format=Shape)
    assert isinstance(answer.output_parsed, Shape) and answer.status == "completed"


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"guided_grammar": 'start: "x" ("y" | "z")'}, "x[yz]"),
        ({"guided_grammar": 'root ::= "yes" | "no"'}, "yes|no"),
        ({"structured_outputs": {"grammar": 'root ::= [ab] end\nend ::= "!"'}}, "[ab]!"),
        ({"guided_json": '{"type": "boolean"}'}, "true|false"),
    ],
)
def test_other_grammars(client: openai.OpenAI, extra: dict[str, Any], pattern: str) -> None:
    answer = client.completions.create(model="fake", prompt="hi", extra_body=extra, max_tokens=20)
    assert re.fullmatch(pattern, answer.choices[0].text)
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "extra",
    [
        {"guided_regex": "("}, {"guided_grammar": "start: nothing"},
        {"guided_json": "{"}, {"guided_json": {"type": "nonsense"}},
        {"guided_choice": ["a"], "guided_regex": "a"},
    ],
)  # fmt: skip
def test_what_is_no_grammar_is_a_400(client: openai.OpenAI, extra: Any, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="fake", prompt="hi", extra_body=extra, stream=stream)


def test_chat_logprobs(client: openai.OpenAI) -> None:
    fields: Any = {
        "model": "fake", "messages": USER, "temperature": 0, "max_tokens": 6, "logprobs": True,
        "top_logprobs": 3,
    }  # fmt: skip
    whole = client.chat.completions.create(**fields).choices[0]
    assert whole.logprobs and whole.logprobs.content and len(whole.logprobs.content) == 6
    for item in whole.logprobs.content:
        assert item.bytes and len(item.top_logprobs) == 3 and item.logprob <= 0
        assert bytes(item.bytes).decode(errors="replace") == item.token
    said = b"".join(bytes(item.bytes or []) for item in whole.logprobs.content)
    assert said.decode(errors="replace") == whole.message.content
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(**fields, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content or []
    assert streamed == whole.logprobs.content
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs"):
        client.chat.completions.create(**{**fields, "logprobs": False})


def test_response_logprobs(client: openai.OpenAI) -> None:
    fields: Any = {
        "model": "fake", "input": "hi", "temperature": 0, "max_output_tokens": 4,
        "top_logprobs": 2, "include": ["message.output_text.logprobs"],
    }  # fmt: skip
    answer: Any = client.responses.create(**fields)
    (part,) = answer.output[0].content
    assert [len(item.top_logprobs) for item in part.logprobs] == [2] * 4
