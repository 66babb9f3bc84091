"""Calls in answers: each format, broken ones, and that cutting the text makes no difference."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.server.answer_events import AnswerEvent, CallArguments, CallBegin, CallEnd, Content
from jaxserve.server.tools.call_stream import CallStream
from jaxserve.server.tools.registry import TOOL_FORMATS, tool_format

NAMES = ("get_weather", "get", "add-1")
PARIS = '{"city": "Paris"}'


def stream(name: str, *, is_parallel: bool = True) -> CallStream:
    ids = itertools.count()
    marks = tool_format(name, chat_template=None, family="").marks
    return CallStream(marks, NAMES, is_parallel=is_parallel, new_id=lambda: f"id{next(ids)}")


def read(name: str, *pieces: str, is_parallel: bool = True) -> list[AnswerEvent]:
    reader = stream(name, is_parallel=is_parallel)
    events = [event for piece in pieces for event in reader.push(piece)]
    return events + reader.finish()


def joined(events: list[AnswerEvent]) -> tuple[str, list[list[str]], list[CallEnd]]:
    """Content, (name, arguments) of all calls, and their ends; checks the events' order."""
    content, calls, ends = "", [], []
    for event in events:
        if isinstance(event, Content):
            assert event.text
            content += event.text
        elif isinstance(event, CallBegin):
            assert event.index == len(calls) == len(ends)
            assert event.call_id == f"id{event.index}"
            calls.append([event.name, ""])
        elif isinstance(event, CallArguments):
            assert event.index == len(calls) - 1 == len(ends)
            assert event.text
            calls[-1][1] += event.text
        elif isinstance(event, CallEnd):
            assert event.index == len(ends)
            ends.append(event)
    return content, calls, ends


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
    found, found_calls, ends = joined(read(name, text))
    assert (found, found_calls) == (content, calls)
    assert all(end.is_valid for end in ends)


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
        assert joined(read(name, *pieces)) == (text, [], [])


@pytest.mark.parametrize(
    ("name", "text", "arguments"),
    [
        ("hermes", '<tool_call>{"name": "get", "arguments": {"a": [1,', '{"a": [1,'),
        ("hermes", tagged(call("get", "{a: 1}")), "{a: 1}"),
        ("hermes", tagged('{"name": "get", "arguments": {}, "x": 1}'), "{}"),
    ],
)
def test_calls_that_break_in_their_arguments_say_so(name: str, text: str, arguments: str):
    _, calls, [end] = joined(read(name, text))
    assert calls == [["get", arguments]]
    assert not end.is_valid
    assert text.startswith(end.source)


def test_a_broken_call_hides_no_other():
    text = f'<tool_call>{{"name": "ge {tagged(call())}'
    for pieces in ([text], text):
        assert joined(read("hermes", *pieces))[:2] == ('<tool_call>{"name": "ge ', ONE)


def test_arguments_are_streamed():
    reader = stream("hermes")
    assert reader.push('<tool_call>{"name": "get", "argum') == []
    assert reader.push('ents": ') == []
    assert reader.push('{"a": "x') == [CallBegin(0, "id0", "get"), CallArguments(0, '{"a": "x')]
    assert reader.push('y"}') == [CallArguments(0, 'y"}')]
    [end] = reader.push("}")
    assert isinstance(end, CallEnd) and end.is_valid
    assert reader.push("</tool_") == reader.push("call>") == reader.finish() == []


def test_content_is_not_held_up():
    reader = stream("hermes")
    assert reader.push("a < b <tool") == [Content("a < b ")]
    assert reader.push("s>") == [Content("<tools>")]
    reader = stream("llama3")
    assert reader.push('{"ci') == []
    assert reader.push('ty"') == [Content('{"city"')]
    assert reader.push(": 1") == [Content(": 1")]


def test_one_call_at_most():
    text = f"{tagged(call())}\n{tagged(call('get', '{}'))} more"
    reader = stream("hermes", is_parallel=False)
    assert joined([*reader.push(text), *reader.finish()])[:2] == ("", ONE)
    assert reader.is_over


FRAGMENTS = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "<|python_tag|>", "```json", "```tool_code", "```", "[", "]",
        call(), call("get", "{}"), call("nobody"), call(key="parameters"), '{"name": "get"',
        ', "arguments": {"a": "\\"}"', "}", "{", '"', "; ", ",", "\n", " ", "Hi", "<", "get(",
        "x=1", ")", 'get_weather(city="Paris")', "\\", "é",
    ]
)  # fmt: skip


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(TOOL_FORMATS)),
    parts=st.lists(FRAGMENTS | st.text(max_size=3), max_size=12),
    cuts=st.lists(st.integers(0, 200), max_size=30),
    is_parallel=st.booleans(),
)
def test_cuts_make_no_difference(name: str, parts: list[str], cuts: list[int], is_parallel: bool):
    text = "".join(parts)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    whole = joined(read(name, text, is_parallel=is_parallel))
    assert joined(read(name, *pieces, is_parallel=is_parallel)) == whole
    assert joined(read(name, *text, is_parallel=is_parallel)) == whole
    content, calls, ends = whole
    assert len(calls) == len(ends) <= (len(text) if is_parallel else 1)
    for (_, arguments), end in zip(calls, ends, strict=True):
        assert not end.is_valid or isinstance(json.loads(arguments), dict)
    if not calls:
        assert content == text


@settings(deadline=None)
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
    content, found, ends = joined(read(name, *text))
    assert content == ""
    assert [(tool, json.loads(arguments)) for tool, arguments in found] == calls
    assert all(end.is_valid for end in ends)
