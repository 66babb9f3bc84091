"""Calls in answers: each format, broken ones, and that cutting the text makes no difference."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.server.answer_events import AnswerEvent, CallArguments, CallBegin, Content
from jaxserve.server.tools.call_stream import CallStream
from jaxserve.server.tools.registry import TOOL_FORMATS, tool_format

NAMES = ("get_weather", "get", "add-1")
PARIS = '{"city": "Paris"}'


def stream(name: str, *, is_parallel: bool = True) -> CallStream:
    ids = itertools.count()
    marks = tool_format(name, chat_template=None, family="").marks
    return CallStream(marks, NAMES, is_parallel=is_parallel, new_id=lambda: f"id{next(ids)}")


def read(
    name: str, *pieces: str, is_parallel: bool = True, is_cut: bool = False
) -> list[AnswerEvent]:
    reader = stream(name, is_parallel=is_parallel)
    events = [event for piece in pieces for event in reader.push(piece)]
    return events + reader.finish(is_cut=is_cut)


def joined(events: list[AnswerEvent]) -> tuple[str, list[list[str]]]:
    """Content, and (name, arguments) of all calls; checks the events' order."""
    content, calls = "", []
    for event in events:
        if isinstance(event, Content):
            assert event.text
            content += event.text
        elif isinstance(event, CallBegin):
            assert event.index == len(calls)
            assert event.call_id == f"id{event.index}"
            calls.append([event.name, ""])
        elif isinstance(event, CallArguments):
            assert event.index == len(calls) - 1
            assert event.text
            calls[-1][1] += event.text
    return content, calls


def call(name: str = "get_weather", arguments: str = PARIS, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def tagged(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


ONE = [["get_weather", PARIS]]
TWO = [["get_weather", PARIS], ["get", "{}"]]


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", "Hello <b>you</b>", "Hello <b>you</b>", []),
        ("hermes", tagged(call()), "", ONE),
        ("hermes", f"<tool_call>{call()}</tool_call>", "", ONE),
        ("hermes", f"<tool_call>{call()}", "", ONE),
        ("hermes", f"\n\n{tagged(call())}\n{tagged(call('get', '{}'))}\n", "", TWO),
        ("hermes", f"<tool_call>[{call()}, {call('get', '{}')}]</tool_call>", "", TWO),
        ("hermes", f"I look.\n{tagged(call())}\nDone.", "I look.\n\nDone.", ONE),
        ("hermes", tagged('{"name": "get"}'), "", [["get", "{}"]]),
        ("hermes", tagged(f'{{"arguments": {PARIS}, "name": "get_weather"}}'), "", ONE),
        ("hermes", tagged('{"id":1 ,"type":"function","name":"get"}'), "", [["get", "{}"]]),
        ("hermes", tagged(call(arguments='{"a": "}\\"<tool_call>"}')), "",
         [["get_weather", '{"a": "}\\"<tool_call>"}']]),
        ("llama3", "Hello {you}", "Hello {you}", []),
        ("llama3", call(key="parameters"), "", ONE),
        ("llama3", f"<|python_tag|>{call(key='parameters')}", "", ONE),
        ("llama3", f"{call()}; {call('get', '{}')}", "", TWO),
        ("llama3", f"{call()}\nThat is it", "That is it", ONE),
        ("llama3", f"I say {call()}", f"I say {call()}", []),
        ("llama3", '{"city": "Paris"}', '{"city": "Paris"}', []),
        ("gemma", call(key="parameters"), "", ONE),
        ("gemma", f"```json\n{call(key='parameters')}\n```", "", ONE),
        ("gemma", f"```json\n[{call()},\n{call('get', '{}')}]\n```\n", "", TWO),
        ("gemma", '[get_weather(city="Paris"), get()]', "", TWO),
        ("gemma", "```tool_code\nget_weather(city='Paris')\n```", "", ONE),
        ("gemma", "```tool_code\nadd-1(a=[1, 2.5], b=None, c=True, d={'x': ')'})\n```", "",
         [["add-1", '{"a": [1, 2.5], "b": null, "c": true, "d": {"x": ")"}}']]),
        ("gemma", "```python\nprint(1)\n```", "```python\nprint(1)\n```", []),
        ("gemma", "[see (1)]", "[see (1)]", []),
        ("gemma", " \n ", " \n ", []),
    ],
)  # fmt: skip
def test_formats(name: str, text: str, content: str, calls: list[list[str]]):
    for pieces in ([text], text):
        for is_cut in (False, True):
            assert joined(read(name, *pieces, is_cut=is_cut)) == (content, calls)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", tagged(call("unknown"))),
        ("hermes", tagged(call(arguments="[1]"))),
        ("hermes", tagged('{"name": "get" "arguments": {}}')),
        ("hermes", tagged('{"name": 1}')),
        ("hermes", tagged("get()")),
        ("hermes", tagged("")),
        ("hermes", "<tool_call>"),
        ("hermes", '<tool_call>\n{"name": "get_weather", "argum'),
        ("hermes", "so <tool_"),
        ("llama3", '{"name": "get", "more": 1}'),
        ("llama3", "<|python_tag|>print(1)"),
        ("llama3", "<|python"),
        ("gemma", "[get_weather(city=Paris)]"),
        ("gemma", '[get_weather("Paris")]'),
        ("gemma", "[get_weather(**{})]"),
        ("gemma", "[get(x=1"),
        ("gemma", "```js"),
        ("gemma", "```\nx = 1\n```"),
    ],
)
def test_broken_calls_are_content(name: str, text: str):
    for pieces in ([text], text):
        assert joined(read(name, *pieces)) == (text, [])


QUOTED = json.dumps('{"city": "Par\\u00eds\\n\U0001f600"}')


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        # What is wrong in or after the arguments takes nothing back, and is no content.
        ("hermes", '<tool_call>{"name": "get", "arguments": {"a": [1,', "",
         [["get", '{"a": [1,']]),
        ("hermes", tagged(call("get", "{a: 1}")), "", [["get", "{a: 1}"]]),
        ("hermes", tagged('{"name": "get", "arguments": {}, "x": {"y": "}"}, "z": 1}'), "",
         [["get", "{}"]]),
        ("hermes", tagged('{"name": "get", "arguments": {} "x" 1}'), "", [["get", "{}"]]),
        ("hermes", tagged('{"name": "get", "arguments": {}, "arguments": {"a": 1}}'), "",
         [["get", "{}"]]),
        ("hermes", tagged(call("get", "{}") + "}"), "", [["get", "{}"]]),
        ("hermes", tagged(call("get", "{}") + "}}])"), "", [["get", "{}"]]),
        ("hermes", tagged(call("get", "{}")[:-1]), "", [["get", "{}"]]),
        ("hermes", tagged(call("get", '{"a": 1}')[:-2]), "", [["get", '{"a": 1\n']]),
        ("hermes", f"{tagged(call())[:-13]} {tagged(call('get', '{}'))}", "", TWO),
        ("hermes", f"<tool_call>{call()} so</tool_call> it is", "so it is", ONE),
        ("llama3", call("get", "{}") + "}", "", [["get", "{}"]]),
        ("llama3", call("get", "{}")[:-1] + "\nThat is it", "That is it", [["get", "{}"]]),
        ("llama3", '{"name": "get", "parameters": {}, "x": 1}; ' + call(), "", TWO[::-1]),
        ("gemma", f"```json\n{call('get', '{}')}}}\n```", "", [["get", "{}"]]),
        ("gemma", "[get())]", "", [["get", "{}"]]),
        # Arguments as a string, or null, are arguments.
        ("hermes", tagged(call(arguments=QUOTED)), "", [["get_weather", json.loads(QUOTED)]]),
        ("llama3", call(arguments=QUOTED, key="parameters"), "",
         [["get_weather", json.loads(QUOTED)]]),
        ("gemma", call(arguments='"{\\"a\\": \\"\\ud83d\\ude00\\ud83d\\"}"'), "",
         [["get_weather", '{"a": "\U0001f600\ufffd"}']]),
        ("hermes", tagged(f'{{"arguments": {QUOTED}, "name": "get"}}'), "",
         [["get", json.loads(QUOTED)]]),
        ("hermes", tagged(call("get", '""')), "", [["get", "{}"]]),
        ("hermes", tagged(call("get", "null")), "", [["get", "{}"]]),
    ],
)  # fmt: skip
def test_a_call_or_text_never_half_of_each(
    name: str, text: str, content: str, calls: list[list[str]]
):
    for pieces in ([text], text):
        assert joined(read(name, *pieces)) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [tagged(call(arguments="[1]")), tagged(call(arguments='"[1]"')), tagged(call(arguments="nul")),
     tagged(call(arguments="nulls")), tagged(call(arguments='" x"'))],
)  # fmt: skip
def test_arguments_that_are_no_object_make_no_call(text: str):
    for pieces in ([text], text):
        assert joined(read("hermes", *pieces)) == (text, [])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", f"{tagged(call())}\n{tagged(call('get', '{}'))}"),
        ("hermes", tagged(call(arguments=QUOTED))),
        ("hermes", f"<tool_call>[{call()}, {call('get', '{}')}]</tool_call>"),
        ("llama3", f"<|python_tag|>{call()}; {call('get', '{}')}"),
    ],
)
def test_tags_that_a_limit_cut_off_are_no_content(name: str, text: str):
    _, whole = joined(read(name, text))
    for size in range(len(text)):
        content, calls = joined(read(name, text[:size], is_cut=True))
        assert (content.strip(), [tool for tool, _ in calls]) == (
            "", [tool for tool, _ in whole[: len(calls)]],
        )  # fmt: skip
        assert joined(read(name, *text[:size], is_cut=True)) == (content, calls)
        for (_, arguments), (_, all_of_them) in zip(calls, whole, strict=False):
            assert all_of_them.startswith(arguments)


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", 'So: <tool_call>{"name": "get", "argum', "So: ", [["get", ""]]),
        ("hermes", 'So: <tool_call>{"name": "g', "So: ", []),
        ("hermes", "So: <tool_call></tool", "So: ", []),
        ("hermes", tagged(call("nobody")), tagged(call("nobody")), []),
        ("llama3", '{"name": "get", ', "", [["get", ""]]),
        ("llama3", '{"name": "g', '{"name": "g', []),
        ("gemma", '[get(x="a', "", [["get", ""]]),
        ("gemma", "```js", "```js", []),
    ],
)
def test_calls_that_a_limit_cut_off(name: str, text: str, content: str, calls: list[list[str]]):
    for pieces in ([text], text):
        assert joined(read(name, *pieces, is_cut=True)) == (content, calls)


def fenced(text: str, language: str = "json") -> str:
    return f"```{language}\n{text}\n```"


CODE = fenced("x = 1\n" + call(), "python")


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (call(), "", ONE),
        (f"\n{call()}\n{call('get', '{}')}", "", TWO),
        (f"[{call()}, {call('get', '{}')}]", "", TWO),
        (f"{call()}\nThat is it", "That is it", ONE),
        (fenced(call()), "", ONE),
        (fenced(call(), ""), "", ONE),
        (fenced(call(key="parameters")), "", ONE),
        (f"I look.\n\n{fenced(call())}\nDone.", "I look.\n\n\nDone.", ONE),
        (f"A\n{fenced(call())}\nB\n{fenced(call('get', '{}'))}", "A\n\nB\n", TWO),
        (fenced(f"{call()}\n{call('get', '{}')}"), "", TWO),
        (f"<tools>\n{call()}\n</tools>", "", ONE),
        (fenced(tagged(call()), "xml"), "", ONE),
        (fenced(f"{tagged(call())}\n{tagged(call('get', '{}'))}", "xml"), "", TWO),
        (f"```json\n{call()}", "", ONE),
        (fenced(call() + "}"), "", ONE),
        (f"{CODE}\n{fenced(call())}", f"{CODE}\n", ONE),
        (f"{CODE}\n{tagged(call())}", f"{CODE}\n", ONE),
        (f"```\nx\n```\n{fenced(call())}", "```\nx\n```\n", ONE),
    ],
)
def test_what_qwen_coder_writes(text: str, content: str, calls: list[list[str]]):
    """Calls without the tags that the template asks for."""
    for pieces in ([text], text):
        assert joined(read("hermes", *pieces)) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        call("nobody"), fenced(call("nobody")), fenced(call(arguments="[1]")),
        '{"name": "get"}', fenced('{"name": "get"}'), '{"name": "get", "city": "Paris"}',
        '{"calls": [\n' + call() + "\n]}", fenced('{"calls": [\n' + call() + "\n]}"),
        "So: " + call(), CODE, f"{CODE}\n{call()}", fenced(f"// a call\n{call()}"),
        "```\n```", "``````", "```", "```json", f"`{call()}`", "[1, 2]", "[]", "{}",
        f"```jsonc\n{call()}\n```", f"````\n{call()}\n````",
    ],
)  # fmt: skip
def test_other_json_and_code_is_left_alone(text: str):
    for pieces in ([text], text):
        for is_cut in (False, True):
            assert joined(read("hermes", *pieces, is_cut=is_cut)) == (text, [])


@pytest.mark.parametrize("text", [call(), fenced(call()), "<tools>" + call() + "</tools>"])
def test_a_grammar_knows_of_tags_alone(text: str):
    marks = tool_format("hermes", chat_template=None, family="").enforced_marks
    reader = CallStream(marks, NAMES)
    assert joined([*reader.push(text), *reader.finish()]) == (text, [])


@pytest.mark.parametrize(
    ("text", "is_call"),
    [
        (call(), True), (fenced(call()), True),
        (fenced('{ "name" :"get" , "arguments": {}}'), True),
        (call(key="parameters"), False), (f'{{"arguments": {PARIS}, "name": "get"}}', False),
        ('{"name": "g\\u0065t", "arguments": {}}', False), (call(arguments=QUOTED), False),
        ('{"type": "function", "name": "get", "arguments": {}}', False),
        (call("get", "null"), False), (f"<tools>{call()}</tools>", False),
    ],
)  # fmt: skip
def test_without_tags_strict_tools_are_called_as_the_grammar_sees_it(text: str, is_call: bool):
    """What else is read as a call would have arguments that nothing holds to their schema."""
    form = tool_format("hermes", chat_template=None, family="")
    for pieces in ([text], text):
        reader = CallStream(form.auto_marks, NAMES, new_id=lambda: "id0")
        events = [event for piece in pieces for event in reader.push(piece)]
        content, calls = joined(events + reader.finish())
        assert (content, len(calls)) == ("", 1) if is_call else (text, 0)


@pytest.mark.parametrize("text", [call(), fenced(call()), fenced(tagged(call()), "xml")])
def test_calls_without_tags_that_a_limit_cut_off(text: str):
    """Up to the arguments it may be any other JSON; then it is a call, as far as it came."""
    for size in range(len(text)):
        content, calls = joined(read("hermes", *text[:size], is_cut=True))
        if calls:
            assert (content, calls[0][0]) == ("", "get_weather")
            assert PARIS.startswith(calls[0][1])
        else:
            assert text[:size].startswith(content)
            assert '"arguments": {' not in text[:size]


def test_a_broken_call_hides_no_other():
    text = f'<tool_call>{{"name": "ge {tagged(call())}'
    for pieces in ([text], text):
        assert joined(read("hermes", *pieces)) == ('<tool_call>{"name": "ge ', ONE)


def test_arguments_are_streamed():
    reader = stream("hermes")
    assert reader.push('<tool_call>{"name": "get", "argum') == []
    assert reader.push('ents": ') == []
    assert reader.push('{"a": "x') == [CallBegin(0, "id0", "get"), CallArguments(0, '{"a": "x')]
    assert reader.push('y"}') == [CallArguments(0, 'y"}')]
    assert reader.push("}") == []
    assert reader.push("</tool_") == reader.push("call>") == reader.finish() == []


def test_content_is_not_held_up():
    reader = stream("hermes")
    assert reader.push("a < b <tool") == [Content("a < b ")]
    assert reader.push("kit>") == [Content("<toolkit>")]
    assert reader.push(" ``") == [Content(" ")]
    assert reader.push("` ") == []
    assert reader.push("x") == [Content("``` "), Content("x")]
    assert reader.push("\n{") == [Content("\n{")]
    reader = stream("hermes")
    assert reader.push('{"ci') == []
    assert reader.push('ty"') == [Content('{"city"')]
    reader = stream("llama3")
    assert reader.push('{"ci') == []
    assert reader.push('ty"') == [Content('{"city"')]
    assert reader.push(": 1") == [Content(": 1")]


def test_one_call_at_most():
    text = f"{tagged(call())}\n{tagged(call('get', '{}'))} more"
    reader = stream("hermes", is_parallel=False)
    assert joined([*reader.push(text), *reader.finish()]) == ("", ONE)
    assert reader.is_over


FRAGMENTS = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "<|python_tag|>", "```json", "```tool_code", "```", "[", "]",
        "<tools>", "</tools>", "```xml", "``",
        call(), call("get", "{}"), call("nobody"), call(key="parameters"), '{"name": "get"',
        ', "arguments": {"a": "\\"}"', "}", "{", '"', "; ", ",", "\n", " ", "Hi", "<", "get(",
        "x=1", ")", call(arguments=QUOTED), '"{\\', ', "x": 1', "null",
        'get_weather(city="Paris")', "\\", "é",
    ]
)  # fmt: skip


@given(
    name=st.sampled_from(sorted(TOOL_FORMATS)),
    parts=st.lists(FRAGMENTS | st.text(max_size=3), max_size=12),
    cuts=st.lists(st.integers(0, 200), max_size=30),
    is_parallel=st.booleans(),
    is_cut=st.booleans(),
)
def test_cuts_make_no_difference(
    name: str, parts: list[str], cuts: list[int], is_parallel: bool, is_cut: bool
):
    text = "".join(parts)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    options = {"is_parallel": is_parallel, "is_cut": is_cut}
    whole = joined(read(name, text, **options))
    assert joined(read(name, *pieces, **options)) == whole
    assert joined(read(name, *text, **options)) == whole
    content, calls = whole
    assert len(calls) <= (len(text) if is_parallel else 1)
    assert all(arguments[:1] == "{" for _, arguments in calls[:-1])
    if not calls and not is_cut:
        assert content == text


@given(
    name=st.sampled_from(sorted(TOOL_FORMATS)),
    calls=st.lists(
        st.tuples(
            st.sampled_from(NAMES),
            st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.integers() | st.none()),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_written_calls_are_read(name: str, calls: list[tuple[str, dict[str, object]]]):
    form = tool_format(name, chat_template=None, family="")
    text = form.separator.join(form.written_call(*one) for one in calls)
    content, found = joined(read(name, *text))
    assert content == ""
    assert [(tool, json.loads(arguments)) for tool, arguments in found] == calls
