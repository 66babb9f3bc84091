"""Tools and thoughts through the `openai` package, over a model that says what it is told to."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import openai
import pytest

from jaxserve.testing.echo_model import EchoModel
from jaxserve.testing.fake_engine import fake_engine

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 8},
                    "unit": {"enum": ["celsius", "fahrenheit"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city", "unit"],
            },
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
STRICT = {**TOOLS[0]["function"], "strict": True}
PARIS = '{"city": "Paris", "unit": "celsius"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def clients(
    serve_in_a_thread: Callable[..., AbstractContextManager[str]],
) -> Iterator[dict[str, openai.OpenAI]]:
    """Of servers with and without a reasoning parser."""
    model = EchoModel()
    engines = [fake_engine(model=model, num_pages=4096, max_model_len=4096) for _ in range(2)]
    parsers = {"tool_call_parser": "hermes", "reasoning_parser": "think"}
    try:
        with (
            serve_in_a_thread(engines[0]) as plain,
            serve_in_a_thread(engines[1], parsers=parsers) as thinking,
        ):
            made = {
                name: openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
                for name, url in (("plain", plain), ("thinking", thinking))
            }
            yield made
            for each in made.values():
                each.close()
    finally:
        for engine in engines:
            engine.shutdown()


@pytest.fixture
def client(clients: dict[str, openai.OpenAI]) -> openai.OpenAI:
    return clients["plain"]


@pytest.fixture
def thinker(clients: dict[str, openai.OpenAI]) -> openai.OpenAI:
    return clients["thinking"]


def ask(client: openai.OpenAI, text: str, **fields: Any) -> Any:
    """The only choice of an answer."""
    answer = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": text}],
        temperature=0, **{"max_tokens": 500, **fields},
    )  # fmt: skip
    [choice] = answer.choices
    return choice


def stream(client: openai.OpenAI, text: str, **fields: Any) -> dict[str, Any]:
    """The same, joined from a stream."""
    joined: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "reason": None}
    chunks: Any = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": text}],
        temperature=0, stream=True, **{"max_tokens": 500, **fields},
    )  # fmt: skip
    for chunk in chunks:
        [choice] = chunk.choices
        joined["content"] += choice.delta.content or ""
        joined["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or []:
            if call.id:  # a new one, which has a name, too
                assert call.index == len(joined["calls"])
                joined["calls"].append([call.id, call.function.name, ""])
            else:
                assert call.index == len(joined["calls"]) - 1
            joined["calls"][call.index][2] += call.function.arguments
        assert joined["reason"] is None
        joined["reason"] = choice.finish_reason
    return joined


def calls_of(message: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or []]


def test_a_call_and_its_stream(client: openai.OpenAI) -> None:
    choice = ask(client, f"\nI look.\n{CALL}\n{TIME}", tools=TOOLS)
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "\nI look.\n"
    assert calls_of(choice.message) == [("get_weather", PARIS), ("get_time", "{}")]
    ids = [call.id for call in choice.message.tool_calls]
    assert len(set(ids)) == 2 and all(i.startswith("call_") for i in ids)
    joined = stream(client, f"\nI look.\n{CALL}\n{TIME}", tools=TOOLS)
    assert joined["content"] == "\nI look.\n"
    assert [call[1:] for call in joined["calls"]] == [["get_weather", PARIS], ["get_time", "{}"]]
    assert joined["reason"] == "tool_calls"


BARE = f'{{"name": "get_weather", "arguments": {PARIS}}}'


@pytest.mark.parametrize(
    ("text", "content"), [(BARE, ""), (f"I look.\n```json\n{BARE}\n```\n", "I look.\n")]
)
def test_json_that_names_a_tool_is_a_call_unless_a_grammar_shapes_the_answer(
    client: openai.OpenAI, text: str, content: str
) -> None:
    choice, joined = ask(client, text, tools=TOOLS), stream(client, text, tools=TOOLS)
    assert calls_of(choice.message) == [("get_weather", PARIS)]
    assert [call[1:] for call in joined["calls"]] == [["get_weather", PARIS]]
    assert (choice.message.content or "") == joined["content"] == content
    assert choice.finish_reason == joined["reason"] == "tool_calls"
    choice = ask(client, text, tools=[{**TOOLS[0], "function": STRICT}])
    assert calls_of(choice.message) == [("get_weather", PARIS)]
    for tools in (None, [{**TOOLS[1]}]):
        choice = ask(client, text, **({} if tools is None else {"tools": tools}))
        assert (choice.message.content, choice.message.tool_calls) == (text, None)
    choice = ask(client, BARE, tools=TOOLS, response_format={"type": "json_object"})
    assert (choice.message.content, choice.message.tool_calls) == (BARE, None)


def test_only_calls(client: openai.OpenAI) -> None:
    choice = ask(client, CALL, tools=TOOLS)
    assert choice.message.content is None
    assert stream(client, CALL, tools=TOOLS)["content"] == ""


def test_no_calls(client: openai.OpenAI) -> None:
    choice = ask(client, "Hello <b>you</b>", tools=TOOLS)
    assert (choice.message.content, choice.message.tool_calls) == ("Hello <b>you</b>", None)
    assert choice.finish_reason == "stop"
    for fields in ({"tools": TOOLS, "tool_choice": "none"}, {}):
        choice = ask(client, CALL, **fields)
        assert (choice.message.content, choice.message.tool_calls) == (CALL, None)
        assert choice.finish_reason == "stop"


def test_a_call_or_text_streamed_as_whole(client: openai.OpenAI) -> None:
    unknown = CALL.replace("get_weather", "nobody")
    surplus = TIME.replace("{}}", '{}, "x": 1}}')
    for text, content, calls in (
        (unknown, unknown, []),
        (CALL.replace('"celsius"', "x"), None, [("get_weather", PARIS.replace('"celsius"', "x"))]),
        (surplus, None, [("get_time", "{}")]),
    ):
        choice, joined = ask(client, text, tools=TOOLS), stream(client, text, tools=TOOLS)
        assert (choice.message.content, calls_of(choice.message)) == (content, calls)
        assert (joined["content"] or None, [tuple(c[1:]) for c in joined["calls"]]) == (
            content, calls,
        )  # fmt: skip
        assert choice.finish_reason == joined["reason"] == ("tool_calls" if calls else "stop")


def test_calls_that_a_limit_cuts_off(client: openai.OpenAI) -> None:
    for size, calls in ((5, []), (40, [("get_weather", "")]), (60, [("get_weather", PARIS[:11])])):
        choice = ask(client, CALL, tools=TOOLS, max_tokens=size)
        assert choice.finish_reason == "length"
        assert (choice.message.content or "", calls_of(choice.message)) == ("", calls)
        joined = stream(client, CALL, tools=TOOLS, max_tokens=size)
        assert (joined["content"], [tuple(c[1:]) for c in joined["calls"]]) == ("", calls)


def test_results_and_tools_become_the_prompt(client: openai.OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    messages: Any = [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "Now"}]},
    ]
    answer = client.chat.completions.create(
        model="fake", messages=messages, tools=TOOLS, max_tokens=99, temperature=0
    )
    # The model repeats the last message, so it was the tool's result.
    assert answer.choices[0].message.content == "<tool_response>\nNow\n</tool_response>"
    body = {"messages": messages, "tools": TOOLS}
    url = str(client.base_url).removesuffix("v1/") + "tokenize"
    counted = json.loads(client.post(url, body=body, cast_to=str))
    assert answer.usage and counted["count"] == answer.usage.prompt_tokens
    text = bytes(counted["tokens"][1:]).decode()
    assert text.startswith("system: ") and '"description": "The weather in a city"' in text
    assert f"assistant: {TIME}\n" in text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": TOOLS * 2}, "tools[2]"),
        ({"tools": TOOLS, "tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"extra_body": {"thinking_token_budget": 3}}, "thinking_token_budget"),
        ({"extra_body": {"chat_template_kwargs": {"x": 1}}}, "chat_template_kwargs.x"),
        ({"reasoning_effort": "hard"}, "reasoning_effort"),
        ({"extra_body": {"functions": [{}]}}, "functions"),
    ],
)  # fmt: skip
def test_refusals(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "Hi", **fields)
    assert caught.value.param == param


def test_thoughts_and_their_stream(thinker: openai.OpenAI) -> None:
    text = f"<think>\nHm, {TIME}?\n</think>\n\nI look. {CALL}"
    choice = ask(thinker, text, tools=TOOLS)
    assert choice.message.reasoning_content == f"Hm, {TIME}?"
    assert choice.message.content == "I look. "
    assert calls_of(choice.message) == [("get_weather", PARIS)]
    joined = stream(thinker, text, tools=TOOLS)
    assert (joined["reasoning"], joined["content"]) == (f"Hm, {TIME}?", "I look. ")
    assert [call[1:] for call in joined["calls"]] == [["get_weather", PARIS]]


def test_thoughts_alone_and_left_out(thinker: openai.OpenAI) -> None:
    text = "<think>Hm</think>Yes"
    choice = ask(thinker, text, extra_body={"include_reasoning": False})
    assert choice.message.content == "Yes"
    assert not hasattr(choice.message, "reasoning_content")
    cut = ask(thinker, text, max_tokens=9)
    assert (cut.message.content, cut.message.reasoning_content) == (None, "Hm")
    assert not hasattr(ask(thinker, "Yes").message, "reasoning_content")


def test_a_message_is_continued(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "user", "content": "Well, well"},
        {"role": "assistant", "content": "Well"},
    ]
    answer = client.chat.completions.create(
        model="fake", messages=messages, max_tokens=99, temperature=0,
        extra_body={"continue_final_message": True},
    )  # fmt: skip
    # This model counts the characters after "assistant:", of which the template has one.
    assert answer.choices[0].message.content == " well"


def continued(client: openai.OpenAI, begun: str, rest: str, **extra: Any) -> Any:
    """The message that goes on with what has begun."""
    # This model repeats the user's text from where the answer's own text, so far, is long.
    said = "." * (len(begun) + 1) + rest
    answer = client.chat.completions.create(
        model="fake", max_tokens=99, temperature=0,
        messages=[{"role": "user", "content": said}, {"role": "assistant", "content": begun}],
        extra_body={"continue_final_message": True, **extra},
    )  # fmt: skip
    return answer.choices[0].message


def test_a_thought_that_the_prompt_has_begun_goes_on(thinker: openai.OpenAI) -> None:
    begun = "<think>\nLet me"
    message = continued(thinker, begun, " think</think>\nYes")
    assert (message.reasoning_content, message.content) == (" think", "Yes")
    budget = len("\nLet me") + 4
    cut = continued(thinker, begun, " think</think>\nYes", thinking_token_budget=budget)
    assert cut.reasoning_content == " thi"
    over = continued(thinker, "<think>a</think>b", " c")
    assert over.content == " c" and not hasattr(over, "reasoning_content")


def test_who_speaks_of_the_marker_does_not_think(thinker: openai.OpenAI) -> None:
    message = ask(thinker, "What is <think> for").message
    assert message.content == "What is <think> for"
    assert not hasattr(message, "reasoning_content")
    message = continued(thinker, "Well", " what is <think> for")
    assert message.content == " what is <think> for"


def test_efforts(thinker: openai.OpenAI) -> None:
    """As litellm, pydantic-ai and openai-agents send them, to whatever model."""
    text = "<think>Hm</think>Yes"
    for effort in ("minimal", "low", "high", "xhigh"):
        assert ask(thinker, text, reasoning_effort=effort).message.reasoning_content == "Hm"
    message = ask(thinker, text, reasoning_effort="none").message
    assert not hasattr(message, "reasoning_content")
    answer = thinker.responses.create(
        model="fake", input=text, temperature=0, reasoning={"effort": "low", "summary": "auto"}
    )
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.reasoning and answer.reasoning.effort == "low"
    assert answer.reasoning.summary is None


def test_thoughts_are_told_in_the_usage(thinker: openai.OpenAI) -> None:
    text = "<think>Hm</think>Yes"
    fields: Any = {
        "model": "fake", "messages": [{"role": "user", "content": text}], "temperature": 0,
        "max_tokens": 99,
    }  # fmt: skip
    usages = [thinker.chat.completions.create(**fields, n=2).usage]
    stream = thinker.chat.completions.create(
        **fields, n=2, stream=True, stream_options={"include_usage": True}
    )
    usages.append(list(stream)[-1].usage)
    for usage in usages:
        assert usage and usage.completion_tokens_details
        assert usage.completion_tokens_details.reasoning_tokens == 2 * len("Hm")
        assert usage.completion_tokens == 2 * (len(text) + 1)
    answer = thinker.responses.create(model="fake", input=text, temperature=0)
    assert answer.usage and answer.usage.output_tokens_details.reasoning_tokens == len("Hm")
