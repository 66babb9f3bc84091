"""Messages in OpenAI's shape, and what templates see of them."""

from typing import Any

import pytest

from jaxserve.core.errors import InvalidRequest
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer
from jaxserve.tokenizers.chat import ChatTemplate
from jaxserve.tokenizers.messages import template_messages

TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}


def call(arguments: Any = '{"a": [1]}', **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "get", "arguments": arguments}, **fields}


def render(source: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    messages = [{"role": "user", "content": "Hi"}] if messages is None else messages
    return ChatTemplate(source).render(messages, bos_token="", eos_token="", **options)


def test_contents_become_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]
    refusal = [{"type": "refusal", "refusal": "no"}]
    contents = [
        message["content"]
        for message in template_messages(
            [
                {"role": "user", "content": parts, "name": "Ann"},
                {"role": "assistant", "content": refusal, "annotations": [], "audio": None},
            ]
        )
    ]
    assert contents == ["a\nb\nc", "no"]


def test_calls_and_results():
    assistant = {"role": "assistant", "content": None, "tool_calls": [call(id="c1"), call("")]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "42"}
    first, second = template_messages([assistant, result])
    assert first["content"] == ""
    functions = [each["function"] for each in first["tool_calls"]]
    assert functions == [{"name": "get", "arguments": {"a": [1]}}, {"name": "get", "arguments": {}}]
    assert first["tool_calls"][0]["id"] == "c1"
    assert second == {**result, "name": "get"}
    [alone] = template_messages([result])
    assert alone == result


def test_reasoning_keeps_one_name():
    for name in ("reasoning", "reasoning_content"):
        [message] = template_messages([{"role": "assistant", "content": "a", name: "Hm"}])
        assert message == {"role": "assistant", "content": "a", "reasoning_content": "Hm"}


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        ('{"a": [1]}', {"a": [1]}), ("", {}), (" ", {}), (None, {}), ("null", {}), ("{", {}),
        ('{"city": "', {"city": ""}), ('{"city": "Par', {"city": "Par"}), ('{"a": 1, "b', {"a": 1}),
        ('{"a": [1, {"b": "c', {"a": [1, {"b": "c"}]}), ('"{\\"a\\": 1}"', {"a": 1}),
        ("[1]", {"arguments": "[1]"}), ('"x"', {"arguments": '"x"'}), ("x", {"arguments": "x"}),
        ("{a: 1}", {"arguments": "{a: 1}"}), ('{"a": "\\ud83d', {"a": ""}),
        ("[" * 99999, {"arguments": "[" * 99999}),
        ('{"a":' * 99 + "1", {"arguments": '{"a":' * 99 + "1"}),
    ],
)  # fmt: skip
def test_arguments_are_what_a_model_said(said: str | None, seen: dict[str, Any]):
    [message] = template_messages([{"role": "assistant", "tool_calls": [call(said)]}])
    assert message["tool_calls"][0]["function"]["arguments"] == seen
    assert template_messages([message]) == [message]


@pytest.mark.parametrize(
    ("fields", "seen"),
    [
        ({"content": None}, {}),
        ({"content": [], "refusal": None, "tool_calls": [], "function_call": None}, {}),
        ({"content": None, "reasoning_content": "Hm"}, {"reasoning_content": "Hm"}),
        ({"content": None, "refusal": "No."}, {"content": "No."}),
        ({"content": "a", "parsed": {"b": 1}, "provider_specific_fields": {"x": 1}},
         {"content": "a"}),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]},
                      {"type": "text", "text": "a", "annotations": []}, {"type": "text"}]},
         {"content": "a\n", "reasoning_content": "Hm"}),
        ({"content": "", "audio": {"id": "x", "transcript": "a"}}, {"content": "a"}),
        ({"content": None, "function_call": {"name": "get", "arguments": "{"}},
         {"tool_calls": [call({})]}),
        ({"tool_calls": [{"id": "c", "type": None, "index": 0, "function": {"name": "get"}}]},
         {"tool_calls": [call({}, id="c")]}),
        ({"tool_calls": [{"type": "custom", "custom": {"name": "get", "input": "x"}}]},
         {"tool_calls": [call({"input": "x"})]}),
    ],
)  # fmt: skip
def test_what_servers_say_is_taken_back(fields: dict[str, Any], seen: dict[str, Any]):
    [message] = template_messages([{"role": "assistant", **fields}])
    assert message == {"role": "assistant", "content": "", **seen}


@pytest.mark.parametrize("content", [None, [], "", [{"type": "text", "text": ""}]])
def test_results_may_be_empty(content: Any):
    for role in ("tool", "function"):
        [message] = template_messages([{"role": role, "tool_call_id": "c", "content": content}])
        assert message == {"role": "tool", "tool_call_id": "c", "content": ""}


def test_hints_to_caches_are_nothing_to_a_model():
    hint = {"cache_control": {"type": "ephemeral"}}
    parts = [{"type": "text", "text": "a", **hint}]
    assert template_messages([{"role": "user", "content": parts, **hint}]) == [
        {"role": "user", "content": "a"}
    ]


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ("Hi", r"messages\[0\] must be an object"),
        ({"content": "Hi"}, r"messages\[0\].role must be"),
        ({"role": "user", "content": None}, r"messages\[0\].content is required"),
        ({"role": "user", "content": []}, r"messages\[0\].content is required"),
        ({"role": "user", "content": 3}, r"messages\[0\].content must be a string or"),
        ({"role": "user", "content": "", "weight": 1}, r"messages\[0\].weight is not supported"),
        ({"role": "user", "content": "", "name": 1}, r"messages\[0\].name must be a string"),
        ({"role": "user", "content": [{"type": "image_url"}]}, r"content\[0\] 'image_url' is not"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "'input_audio' is not supported"),
        ({"role": "user", "content": [{"text": "x"}]}, 'must be an object with a "type"'),
        ({"role": "user", "content": [{"type": "text"}]}, r"content\[0\].text must be a string"),
        ({"role": "user", "tool_calls": [call()]}, "belongs to the assistant"),
        ({"role": "assistant", "tool_calls": {}}, "tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": [{"type": "custom"}]}, "of the type function"),
        ({"role": "assistant", "tool_calls": [call(id=1)]}, r"tool_calls\[0\].id must be"),
        ({"role": "assistant", "tool_calls": [call([1])]}, "arguments must be a JSON object"),
        ({"role": "assistant", "audio": {"id": "a1"}}, "audio is not supported: .* text only"),
    ],
)
def test_refused(message: Any, where: str):
    with pytest.raises(InvalidRequest, match=where) as caught:
        template_messages([message])
    assert caught.value.param is not None
    assert caught.value.param.startswith("messages[0]")


def test_templates_see_tools_and_calls():
    source = (
        "{% for t in tools %}{{ t.function.name }}{{ t | tojson }}{% endfor %}"
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}"
        "{% endfor %}{% endfor %}"
    )
    messages = [{"role": "assistant", "tool_calls": [call()]}]
    text = '{"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}'
    assert render(source, messages, tools=[TOOL]) == f'get{text}{{"a": [1]}}'
    assert render("{{ tools is none }}", tools=[]) == "True"
    with pytest.raises(InvalidRequest, match="knows of no tools"):
        render("{{ messages }}", tools=[TOOL])


def test_variables():
    source = "{% set own = 1 %}{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    assert render(source) == ""
    assert render(source, variables={"enable_thinking": False}) == "False"
    assert ChatTemplate(source).variables == {"enable_thinking"}
    with pytest.raises(InvalidRequest, match=r"chat_template_kwargs\.own: .* reads no such"):
        render(source, variables={"own": 1})
    with pytest.raises(InvalidRequest, match="messages is not for a request to set"):
        render("{{ messages }}", variables={"messages": []})
    with pytest.raises(InvalidRequest, match="unsafe"):
        render("{{ x.__class__.__mro__ }}", variables={"x": "a"})


def test_developers_are_the_system():
    messages = [{"role": "developer", "content": ""}]
    assert render("{{ messages[0].role }}", messages) == "system"
    assert render("{{ messages[0].role }}", [{"role": "developers", "content": ""}]) == "developers"
    assert render("{# developer #}{{ messages[0].role }}", messages) == "developer"


@pytest.mark.parametrize(
    ("content", "source"),
    [
        ("The sky", "{{ m.role }}: {{ m.content }}<end>\n"),
        ("The sky is ", "{{ m.role }}: {{ m.content | trim }}<end>\n"),
        ("assistant", "{{ m.role }}: {{ m.content }}<end>{{ m.role }}\n"),
    ],
)
def test_the_last_message_is_continued(content: str, source: str):
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    source = "{% for m in messages %}" + source + "{% endfor %}"
    text = render(source, messages, continue_final_message=True, add_generation_prompt=False)
    assert text == render(source, messages[:1]) + "assistant: " + content


@pytest.mark.parametrize(
    ("messages", "options", "reason"),
    [
        ([{"role": "user", "content": "a"}], {"add_generation_prompt": True}, "contradict"),
        ([], {}, "needs a last message"),
        ([{"role": "assistant", "content": " "}], {}, "needs a last message"),
        ([{"role": "assistant", "content": "a", "tool_calls": [call()]}], {}, "without tool calls"),
        ([{"role": "user", "content": "a"}], {}, "leaves the last message out"),
    ],
)
def test_nothing_to_continue(messages: list[dict[str, Any]], options: Any, reason: str):
    options = {"add_generation_prompt": False, **options}
    with pytest.raises(InvalidRequest, match=reason):
        render("-", messages, continue_final_message=True, **options)


def test_tokenizers_pass_it_on():
    tokenizer = ByteTokenizer()
    assert "messages" in tokenizer.chat_variables
    assert "tools" not in tokenizer.chat_variables
    messages = [{"role": "assistant", "content": [{"type": "text", "text": "Well"}]}]
    options: Any = {"add_generation_prompt": False, "continue_final_message": True}
    assert tokenizer.render_chat(messages, **options).text == "<bos>assistant: Well"
    assert tokenizer.apply_chat_template(messages, **options) == [
        tokenizer.BOS, *b"assistant: Well",
    ]  # fmt: skip
    with pytest.raises(InvalidRequest, match="reads no such variable"):
        tokenizer.render_chat(messages, chat_template_kwargs={"x": 1})
