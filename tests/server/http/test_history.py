"""What a server has said is taken back, whatever it was; and errors name the caller's fields.

The items are those of the `openai` package: streamed, cut off, dumped with all their nulls.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import openai
import pytest

from jaxserve.core.errors import InvalidRequest
from jaxserve.server.http.response_input import response_messages

FUNCTION: Any = {"name": "get", "parameters": {"type": "object"}}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]
FLAT: Any = [{"type": "function", "strict": False, **FUNCTION}]
CALL = '<tool_call>\n{"name": "get", "arguments": {"city": "Paris"}}\n</tool_call>'
THOUGHT = "<think>Hm</think>"
USER: Any = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def client(echo_client: Callable[[int], openai.OpenAI]) -> openai.OpenAI:
    return echo_client(2048)


def chat(client: openai.OpenAI, messages: Any, **fields: Any) -> Any:
    """The message of an answer."""
    answer = client.chat.completions.create(
        model="fake", messages=messages, temperature=0, **{"max_tokens": 300, **fields}
    )
    return answer.choices[0].message


def prompt(client: openai.OpenAI, messages: Any) -> str:
    """What the model gets to read of messages."""
    url = str(client.base_url).removesuffix("v1/") + "tokenize"
    counted = json.loads(client.post(url, body={"messages": messages}, cast_to=str))
    return bytes(token for token in counted["tokens"] if token < 256).decode()


def test_a_streamed_call_that_was_cut_off_goes_back(client: openai.OpenAI) -> None:
    cut = len(CALL[: CALL.index("Paris")])
    stream: Any = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": CALL}], tools=TOOLS, stream=True,
        temperature=0, max_tokens=cut,
    )  # fmt: skip
    [choices] = [[chunk.choices[0] for chunk in stream]]
    pieces = [call for choice in choices for call in choice.delta.tool_calls or []]
    call = {
        "id": pieces[0].id, "type": "function",
        "function": {
            "name": pieces[0].function.name,
            "arguments": "".join(piece.function.arguments for piece in pieces),
        },
    }  # fmt: skip
    assert call["function"] == {"name": "get", "arguments": '{"city": "'}
    assert choices[-1].finish_reason == "length"
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "cut"}
    answer = chat(client, [USER, turn, result], tools=TOOLS)
    assert answer.content == "<tool_response>\ncut\n</tool_response>"
    assert '{"name": "get", "arguments": {"city": ""}}' in prompt(client, [USER, turn, result])


@pytest.mark.parametrize("said", [CALL, f"{THOUGHT}Yes", ""])
@pytest.mark.parametrize("max_tokens", [1, 9, 300])
def test_messages_go_back_as_the_client_dumps_them(
    client: openai.OpenAI, said: str, max_tokens: int
) -> None:
    first = chat(client, [{"role": "user", "content": said}], tools=TOOLS, max_tokens=max_tokens)
    turn: Any = first.model_dump()
    history = [USER, turn]
    history += [
        {"role": "tool", "tool_call_id": call["id"], "content": None}
        for call in turn["tool_calls"] or []
    ]
    again = chat(client, [*history, {"role": "user", "content": "So?"}], tools=TOOLS)
    assert again.content.endswith("So?")


@pytest.mark.parametrize("said", [f"{THOUGHT}I look. {CALL}\n{CALL}", CALL, "Hi"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [12, 300])
def test_items_go_back_as_the_client_dumps_them(
    client: openai.OpenAI, said: str, stream: bool, max_tokens: int
) -> None:
    fields: Any = {
        "model": "fake", "temperature": 0, "max_output_tokens": max_tokens, "tools": FLAT,
        "include": ["reasoning.encrypted_content"],
    }  # fmt: skip
    first: Any = client.responses.create(input=said, stream=stream, **fields)
    output = list(first)[-1].response.output if stream else first.output
    items: list[Any] = [item.model_dump() for item in output]
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": f"result {i}"}
        for i, item in enumerate(items)
        if item["type"] == "function_call"
    ]
    history = [{"type": "message", **USER}, *items, *results]
    again: Any = client.responses.create(
        input=[*history, {"role": "user", "content": "So?"}], **{**fields, "max_output_tokens": 300}
    )
    assert again.output_text.endswith("So?")
    assert all(result["output"] in again.output_text for result in results)


def test_items_of_other_servers(client: openai.OpenAI) -> None:
    history: list[Any] = [
        {"type": "reasoning", "id": "rs_1", "encrypted_content": "gAAA", "content": None,
         "summary": [{"type": "summary_text", "text": "Hm"}]},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "gAAA"},
        {"type": "function_call", "call_id": "c1", "name": "get", "arguments": '{"a": 1',
         "namespace": "n", "caller": {"type": "direct"}, "parsed_arguments": None},
        {"type": "function_call_output", "call_id": "c1", "output": [], "status": None},
        {"type": "custom_tool_call", "call_id": "c2", "name": "run", "input": "ls", "id": None},
        {"type": "custom_tool_call_output", "call_id": "c2",
         "output": [{"type": "input_text", "text": "files"}]},
        {"type": "mcp_call", "id": "m1", "name": "ask", "arguments": "null", "output": "told",
         "server_label": "s"},
        {"type": "mcp_list_tools", "id": "m2", "server_label": "s", "tools": [], "error": None},
        {"type": "web_search_call", "id": "w1", "status": "completed",
         "action": {"type": "search", "query": "q", "sources": None}},
        {"type": "file_search_call", "id": "f1", "status": "completed", "queries": ["q"],
         "results": [{"text": "found", "score": 0.5, "attributes": None}]},
        {"type": "code_interpreter_call", "id": "i1", "status": "completed", "code": "1 + 1",
         "container_id": "c", "outputs": [{"type": "logs", "logs": "2"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "refusal", "refusal": "No."}], "phase": None},
        USER,
    ]  # fmt: skip
    answer = client.responses.create(model="fake", input=history, temperature=0)
    assert answer.output_text == "Hi"
    told = json.dumps(response_messages(history, None))
    for said in ("web_search", '"query": "q"', "file_search", "found", "1 + 1", "logs", "files"):
        assert json.dumps(said)[1:-1] in told or said in told
    with pytest.raises(InvalidRequest, match=r"input\[0\].id must"):
        response_messages([{"type": "web_search_call"}], None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [USER, {"role": "user", "content": "x", "caller": 1}]}, "input[1].caller"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": ["message"]}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input[0].content[0]"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "get"}]},
         "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "reasoning", "content": "x", "summary": 1}, 5]}, "input[1]"),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": "x" * 4000}, "input"),
        ({"temperature": -1}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 99, "include": ["message.output_text.logprobs"]}, "include"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "text.format"),
        ({"extra_body": {"ttft_target_ms": -1}}, "ttft_target_ms"),
    ],
)  # fmt: skip
def test_errors_of_responses_name_the_place(
    client: openai.OpenAI, fields: Mapping[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": "fake", "input": "Hi", **fields})
    assert caught.value.param == param
    assert "function-" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"extra_body": {"min_tokens": -1}}, "min_tokens"),
        ({"extra_body": {"top_k": -5}}, "top_k"),
        ({"extra_body": {"guided_grammar": "start: nothing"}}, "guided_grammar"),
        ({"response_format": {"type": "json_schema",
                              "json_schema": {"name": "x", "schema": {"type": "x"}}}},
         "response_format"),
        ({"messages": [{"role": "user", "content": "x" * 4000}]}, "messages"),
    ],
)  # fmt: skip
def test_errors_of_chat_name_the_field(
    client: openai.OpenAI, fields: Mapping[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "fake", "messages": [USER], **fields})
    assert caught.value.param == param


def test_errors_of_completions_name_the_field(client: openai.OpenAI) -> None:
    fields: Any
    for fields in ({"logprobs": 99}, {"temperature": 999}, {"prompt": "x" * 4000}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{"model": "fake", "prompt": "Hi", **fields})
        assert caught.value.param == next(iter(fields))


def test_nothing_is_stored_and_the_answer_says_so(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="fake", input="Hi", store=True, metadata={"a": "b"})
    assert answer.model_extra and answer.model_extra["store"] is False
    assert answer.metadata == {"a": "b"}
    assert chat(client, [USER], store=True, metadata={"a": "b"}).content == "Hi"


def test_what_gateways_add_is_no_matter(client: openai.OpenAI) -> None:
    """litellm's and langchain's ways to say what another server could make of it."""
    hints: Any = {"cache_control": {"type": "ephemeral"}, "provider_specific_fields": {"a": 1}}
    tools: Any = [{"type": "function", "function": {**FUNCTION, **hints}, **hints}]
    turn = {**chat(client, [{"role": "user", "content": CALL}], tools=tools).model_dump(), **hints}
    turn["tool_calls"][0].update(hints)
    result = {"role": "tool", "tool_call_id": turn["tool_calls"][0]["id"], "content": "x", **hints}
    said = [{"type": "text", "text": "So?", **hints}]
    messages = [{**USER, **hints}, turn, result, {"role": "user", "content": said}]
    assert chat(client, messages, tools=tools).content.endswith("So?")
    flat: Any = [{**FLAT[0], **hints}]
    assert client.responses.create(model="fake", input="Hi", tools=flat).output_text == "Hi"


def test_a_conversation_that_is_too_long_loses_its_beginning(client: openai.OpenAI) -> None:
    call: Any = {"type": "function_call", "call_id": "c", "name": "get", "arguments": "{}"}
    turns: list[Any] = [
        item
        for i in range(12)
        for item in (
            {"role": "user", "content": f"{i} " + "x" * 200}, call,
            {"type": "function_call_output", "call_id": "c", "output": f"{i}"},
        )
    ]  # fmt: skip
    fields: Any = {
        "model": "fake", "instructions": "Be brief", "temperature": 0, "truncation": "auto",
        "input": [*turns, {"role": "user", "content": "So?"}], "max_output_tokens": 90,
    }  # fmt: skip
    answer = client.responses.create(**fields)
    assert answer.output_text.endswith("So?") and answer.truncation == "auto"
    assert answer.usage and 1600 < answer.usage.input_tokens <= 2048 - 90
    for wrong in ({"truncation": "disabled"}, {"input": "x" * 4000}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**{**fields, **wrong})
        assert caught.value.param == "input"
    short = client.responses.create(**{**fields, "input": "Hi"})
    assert short.output_text == "Hi"
    one_turn = [{"role": "user", "content": "x" * 900}, *turns[1:3], call, *turns[2::3], *turns[3:]]
    assert client.responses.create(**{**fields, "input": one_turn}).usage
