"""Tools and thoughts in the Responses API, over a model that says what it is told to."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import openai
import pytest

TOOLS: Any = [
    {"type": "function", "name": "get", "parameters": {"type": "object"}, "strict": False},
]
CALL = '<tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call>'
ALL = f"<think>Hm\n</think>\nI look. {CALL}\n{CALL}"


@pytest.fixture(scope="module")
def client(echo_client: Callable[[int], openai.OpenAI]) -> openai.OpenAI:
    return echo_client(4096)


def ask(client: openai.OpenAI, text: Any, **fields: Any) -> Any:
    return client.responses.create(
        model="fake", input=text, temperature=0, **{"max_output_tokens": 500, **fields}
    )


def told(items: Sequence[Any]) -> list[tuple[str, str]]:
    """Type and text of all items."""
    return [
        (item.type, item.arguments if item.type == "function_call" else item.content[0].text)
        for item in items
    ]


def test_items(client: openai.OpenAI) -> None:
    answer = ask(client, ALL, tools=TOOLS)
    assert told(answer.output) == [
        ("reasoning", "Hm"), ("message", "I look. "),
        ("function_call", '{"a": 1}'), ("function_call", '{"a": 1}'),
    ]  # fmt: skip
    assert answer.status == "completed"
    assert {item.status for item in answer.output} == {"completed"}
    assert len({item.id for item in answer.output}) == 4
    assert len({item.call_id for item in answer.output[2:]}) == 2
    assert answer.output[2].name == "get"
    assert answer.tools[0].name == "get"


def test_a_stream_tells_the_same(client: openai.OpenAI) -> None:
    events: list[Any] = list(ask(client, ALL, tools=TOOLS, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    done = [event.item for event in events if event.type == "response.output_item.done"]
    final = events[-1].response
    assert told(done) == told(final.output) == told(ask(client, ALL, tools=TOOLS).output)
    joined: dict[str, str] = {}
    for event in events:
        if event.type.endswith(".delta"):
            joined[event.item_id] = joined.get(event.item_id, "") + event.delta
    assert list(joined) == [item.id for item in final.output]
    assert list(joined.values()) == [text for _, text in told(final.output)]
    kinds = [event.type for event in events]
    assert "response.reasoning_text.done" in kinds
    assert kinds.count("response.function_call_arguments.done") == 2


def test_the_client_accumulates_a_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model="fake", input=CALL, tools=TOOLS, temperature=0) as stream:
        [call] = [item for item in stream.get_final_response().output]
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"a": 1}


def test_a_conversation_goes_on_with_its_items(client: openai.OpenAI) -> None:
    first = ask(client, ALL, tools=TOOLS)
    history: list[Any] = [{"role": "user", "content": "Hi"}]
    history += [item.to_dict() for item in first.output]
    history += [
        {"type": "function_call_output", "call_id": item.call_id, "output": f"result {i}"}
        for i, item in enumerate(first.output[2:])
    ]
    again = ask(client, history, tools=TOOLS)
    # The model repeats the last message: that of the results.
    assert again.output_text == (
        "<tool_response>\nresult 0\n</tool_response>\n<tool_response>\nresult 1\n</tool_response>"
    )


def test_cut_off(client: openai.OpenAI) -> None:
    answer = ask(client, ALL, tools=TOOLS, max_output_tokens=9)
    assert answer.status == "incomplete"
    assert told(answer.output) == [("reasoning", "Hm")]
    assert answer.output[0].status == "incomplete"
    empty = ask(client, "<think></think>", tools=TOOLS)
    assert told(empty.output) == [("message", "")]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [{"type": "file_search"}]}, "'file_search' is not supported"),
        ({"tools": TOOLS, "tool_choice": {"type": "mcp"}}, "'mcp' is not supported"),
        ({"tools": TOOLS, "include": ["message.output_text.logprobs"]}, "include"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "x", "name": "get"}]}, "arguments"),
    ],
)  # fmt: skip
def test_refusals(client: openai.OpenAI, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        ask(client, fields.pop("input", "Hi"), **fields)
