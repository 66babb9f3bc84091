"""Calls and answers that grammars force on a model that says anything."""

import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jsonschema
import openai
import pytest

from jaxserve.testing.fake_engine import fake_engine
from jaxserve.testing.fake_executor import FakeModel

ORDER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "at": {"type": "array", "items": {"$ref": "#/$defs/place"}, "maxItems": 2},
    },
    "required": ["city", "unit"],
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "boolean"}},
                        "additionalProperties": False}},
}  # fmt: skip
# Far apart in ASCII, so that the hash picks either.
SCHEMAS: dict[str, Any] = {"z_order": ORDER, "0time-1": None, "0time": None}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
OK = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
      "additionalProperties": False}  # fmt: skip
FORMATS = ("hermes", "llama3", "gemma")


@pytest.fixture(scope="module")
def clients(
    serve_in_a_thread: Callable[..., AbstractContextManager[str]],
) -> Iterator[dict[str, openai.OpenAI]]:
    """Of one engine's servers, by their format of tool calls, or `thinking`."""
    engine = fake_engine(
        model=FakeModel(vocab_size=258), num_pages=4096, max_model_len=4096, step_seconds=0.0
    )
    parsers = {name: {"tool_call_parser": name} for name in FORMATS}
    parsers["thinking"] = {"tool_call_parser": "llama3", "reasoning_parser": "think"}
    with contextlib.ExitStack() as stack:
        stack.callback(engine.shutdown)
        yield {
            name: openai.OpenAI(
                base_url=stack.enter_context(serve_in_a_thread(engine, parsers=options)) + "/v1",
                api_key="none",
                max_retries=0,
            )
            for name, options in parsers.items()
        }


def ask(client: openai.OpenAI, seed: int, **fields: Any) -> Any:
    """A choice that came to its end by itself."""
    answer = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "Hi"}],
        seed=seed, **{"max_tokens": 2500, **fields},
    )  # fmt: skip
    [choice] = answer.choices
    assert choice.finish_reason != "length"
    return choice


def stream_calls(client: openai.OpenAI, seed: int, **fields: Any) -> tuple[list[list[str]], Any]:
    """Names and arguments, joined from a stream, and the finish reason."""
    chunks: Any = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "Hi"}],
        seed=seed, stream=True, **{"max_tokens": 2500, **fields},
    )  # fmt: skip
    calls, reason = [], None
    for chunk in chunks:
        [choice] = chunk.choices
        assert not choice.delta.content
        for call in choice.delta.tool_calls or []:
            if call.id:
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments
        reason = choice.finish_reason
    return calls, reason


def checked_calls(choice: Any) -> list[list[str]]:
    """Names and arguments of calls, which fit their schemas."""
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    for call in choice.message.tool_calls:
        arguments = json.loads(call.function.arguments)
        jsonschema.validate(arguments, SCHEMAS[call.function.name] or {"maxProperties": 0})
    return [[call.function.name, call.function.arguments] for call in choice.message.tool_calls]


@pytest.mark.parametrize("name", FORMATS)
def test_required_calls_fit_their_schemas(clients: dict[str, openai.OpenAI], name: str) -> None:
    tools = set()
    for seed in range(6):
        required = {"tools": TOOLS, "tool_choice": "required"}
        tools |= {tool for tool, _ in checked_calls(ask(clients[name], seed, **required))}
        one = ask(clients[name], seed, **required, parallel_tool_calls=False)
        assert len(checked_calls(one)) == 1
    assert len(tools) > 1


def test_parallel_calls_are_many_but_not_endless(clients: dict[str, openai.OpenAI]) -> None:
    on_and_on: Any = {"logit_bias": {str(ord("\n")): 100}}  # stands only between calls
    fields: Any = {"tools": TOOLS[1:], "tool_choice": "required", **on_and_on}
    calls, reason = stream_calls(clients["hermes"], 1, **fields)
    assert reason == "tool_calls"
    assert len(calls) == 32
    assert {arguments for _, arguments in calls} == {"{}"}
    one = ask(clients["hermes"], 1, **fields, parallel_tool_calls=False)
    assert len(checked_calls(one)) == 1


@pytest.mark.parametrize("name", FORMATS)
def test_named_calls_are_that_one(clients: dict[str, openai.OpenAI], name: str) -> None:
    for tool in SCHEMAS:
        choice: Any = {"type": "function", "function": {"name": tool}}
        for seed in range(2):
            whole = checked_calls(ask(clients[name], seed, tools=TOOLS, tool_choice=choice))
            assert [called for called, _ in whole] == [tool]
            streamed = stream_calls(clients[name], seed, tools=TOOLS, tool_choice=choice)
            assert streamed == (whole, "tool_calls")


def test_strict_tools_and_free_text(clients: dict[str, openai.OpenAI]) -> None:
    strict: Any = [
        {"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS
    ]
    for name in FORMATS:
        for seed in range(4):
            choice = ask(clients[name], seed, tools=strict)
            if choice.message.tool_calls:
                checked_calls(choice)


@pytest.mark.parametrize("budget", [0, 5])
def test_thoughts_come_before_forced_calls(clients: dict[str, openai.OpenAI], budget: int) -> None:
    thoughts = set()
    for seed in range(12):
        choice = ask(
            clients["thinking"], seed, tools=TOOLS, tool_choice="required",
            extra_body={"thinking_token_budget": budget, "return_token_ids": True},
        )  # fmt: skip
        checked_calls(choice)
        text = bytes(token for token in choice.token_ids if token < 256)
        begins = text.startswith(b"<think>")
        assert begins == (b"</think>" in text)
        assert not begins or text.index(b"</think>") <= len(b"<think>") + budget
        thoughts.add(begins)
    assert thoughts == {True, False}


def test_thoughts_come_before_an_answer_of_a_schema(clients: dict[str, openai.OpenAI]) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "ok", "schema": OK}}
    thoughts = set()
    for seed in range(8):
        choice = ask(
            clients["thinking"], seed, response_format=form,
            extra_body={"thinking_token_budget": 9},
        )  # fmt: skip
        jsonschema.validate(json.loads(choice.message.content), OK)
        thoughts.add(hasattr(choice.message, "reasoning_content"))
    assert thoughts == {True, False}


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_is_for_content_and_the_call_for_the_call(
    clients: dict[str, openai.OpenAI], name: str
) -> None:
    """As openai-agents asks with an output type and required tools, and instructor."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "ok", "schema": OK}}
    required: Any = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    assert checked_calls(ask(clients[name], 1, **required, response_format=form))
    flat: Any = [{"type": "function", **tool["function"], "strict": True} for tool in TOOLS]
    answer = clients[name].responses.create(
        model="fake", input="Hi", tools=flat, tool_choice={"type": "function", "name": "0time"},
        text={"format": {"type": "json_object"}},
    )  # fmt: skip
    [call] = answer.output
    assert call.type == "function_call" and json.loads(call.arguments) == {}


@pytest.mark.parametrize("name", FORMATS)
def test_only_allowed_tools_are_called(clients: dict[str, openai.OpenAI], name: str) -> None:
    only: Any = {"type": "function", "function": {"name": "0time"}}
    called = set()
    for mode, seeds in (("required", 2), ("auto", 4)):
        allowed: Any = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [only]}}
        for seed in range(seeds):
            choice = ask(clients[name], seed, tools=TOOLS, tool_choice=allowed)
            assert mode == "auto" or choice.message.tool_calls
            called |= {call.function.name for call in choice.message.tool_calls or []}
    assert called == {"0time"}


def test_allowed_tools_of_responses(clients: dict[str, openai.OpenAI]) -> None:
    flat: Any = [{"type": "function", **tool["function"], "strict": False} for tool in TOOLS]
    only: Any = [{"type": "function", "name": "0time"}]
    answer = clients["hermes"].responses.create(
        model="fake", input="Hi", tools=flat,
        tool_choice={"type": "allowed_tools", "mode": "required", "tools": only},
    )  # fmt: skip
    assert {call.name for call in answer.output if call.type == "function_call"} == {"0time"}
    wrong: Any
    for tools, where in (([], "tools"), ([{"type": "function", "name": "x"}], r"tools\[0\]")):
        wrong = {"type": "allowed_tools", "mode": "auto", "tools": tools}
        with pytest.raises(openai.BadRequestError, match=where):
            clients["hermes"].responses.create(
                model="fake", input="Hi", tools=flat, tool_choice=wrong
            )


@pytest.mark.parametrize("name", FORMATS)
def test_a_schema_or_a_call(clients: dict[str, openai.OpenAI], name: str) -> None:
    """As openai-agents asks with an output type and tools, once a required one was called."""
    # Its key is far from "name", so that the hash picks either.
    schema = {"type": "object", "properties": {"0k": {"type": "boolean"}}, "required": ["0k"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "ok", "schema": schema}}
    seen = set()
    for seed in range(12):
        choice = ask(clients[name], seed, tools=TOOLS, response_format=form)
        if choice.message.tool_calls:
            checked_calls(choice)
        else:
            jsonschema.validate(json.loads(choice.message.content), schema)
        seen.add(choice.finish_reason)
        if len(seen) == 2:
            break
    assert seen == {"tool_calls", "stop"}
