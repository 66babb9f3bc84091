"""The `openai` package against a server: what most users' programs do."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

USER: Any = [{"role": "user", "content": "hi"}]
PROMPT = [256, *b"user: hi\nassistant:"]


@pytest.fixture(scope="module")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def text_of(expected, max_tokens: int, prompt: list[int] = PROMPT) -> str:
    return bytes(expected(prompt, max_tokens)).decode(errors="replace")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "jaxserve"
    with pytest.raises(openai.NotFoundError, match="other"):
        client.models.retrieve("other")


def test_chat(client: openai.OpenAI, expected) -> None:
    answer = client.chat.completions.create(
        model="fake", messages=USER, temperature=0, max_completion_tokens=9, n=2, user="me"
    )
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [text_of(expected, 9)] * 2
    assert answer.usage and answer.usage.completion_tokens == 18
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer._request_id


def test_chat_stream(client: openai.OpenAI, expected) -> None:
    text, reasons, usages = "", [], []
    with client.chat.completions.create(
        model="fake", messages=USER, temperature=0, max_tokens=9, stream=True,
        stream_options={"include_usage": True},
    ) as stream:  # fmt: skip
        for chunk in stream:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reasons.append(choice.finish_reason)
            usages.append(chunk.usage)
    assert text == text_of(expected, 9)
    assert reasons[-1] == "length" and not any(reasons[:-1])
    assert usages[-1] and usages[-1].total_tokens == len(PROMPT) + 9 and not any(usages[:-1])


def test_chat_stream_helper(client: openai.OpenAI, expected) -> None:
    with client.chat.completions.stream(
        model="fake", messages=USER, temperature=0, max_tokens=9
    ) as stream:
        stream.until_done()
    # Its parser raises for an answer that was cut, as it does with OpenAI's.


def test_parts_and_extra_body(client: openai.OpenAI, expected) -> None:
    parts: Any = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    answer = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": parts}], temperature=0,
        max_tokens=4, extra_body={"return_token_ids": True, "ignore_eos": True, "top_k": 1},
    )  # fmt: skip
    prompt = [256, *b"user: h\ni\nassistant:"]
    assert answer.choices[0].message.content == text_of(expected, 4, prompt)
    assert answer.model_extra and answer.model_extra["prompt_token_ids"] == prompt
    extra = answer.choices[0].model_extra
    assert extra and extra["token_ids"] == expected(prompt, 4)


def test_completion(client: openai.OpenAI, expected) -> None:
    fields: Any = {"model": "fake", "prompt": "hi", "temperature": 0, "max_tokens": 5}
    whole = client.completions.create(**fields)
    assert whole.choices[0].text == text_of(expected, 5, [256, *b"hi"])
    with client.completions.create(**fields, stream=True, echo=True) as stream:
        assert "".join(c.choices[0].text for c in stream) == "hi" + whole.choices[0].text


def test_response(client: openai.OpenAI, expected) -> None:
    prompt = [256, *b"system: be brief\nuser: hi\nassistant:"]
    fields: Any = {"model": "fake", "input": "hi", "instructions": "be brief", "temperature": 0}
    answer: Any = client.responses.create(**fields, max_output_tokens=7, metadata={"a": "b"})
    assert answer.output_text == text_of(expected, 7, prompt)
    assert answer.status == "incomplete" and answer.metadata == {"a": "b"}
    assert answer.incomplete_details and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage and answer.usage.output_tokens == 7
    assert answer.usage.input_tokens == len(prompt)
    # A conversation goes on with the answer's own items sent back.
    history: Any = [{"role": "user", "content": "hi"}, *(i.to_dict() for i in answer.output)]
    counted = client.responses.input_tokens.count(model="fake", input="hi", instructions="be brief")
    assert counted.object == "response.input_tokens"
    assert counted.input_tokens == answer.usage.input_tokens
    again: Any = client.responses.create(
        model="fake", input=[*history, {"role": "user", "content": "so?"}], max_output_tokens=1,
    )  # fmt: skip
    assert again.usage.input_tokens > len(prompt)


def test_response_stream(client: openai.OpenAI, expected) -> None:
    stream = client.responses.create(
        model="fake", input=USER, temperature=0, max_output_tokens=9, stream=True
    )
    events: list[Any] = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == [
        "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"output_text.delta"}
    text = "".join(event.delta for event in events[4:-4])
    assert text == events[-4].text == events[-1].response.output_text == text_of(expected, 9)


def test_errors_have_their_classes(client: openai.OpenAI) -> None:
    def ask(**fields: Any) -> None:
        client.chat.completions.create(**{"model": "fake", "messages": USER, **fields})

    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="other")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        ask(temperature=-1)
    assert bad.value.type == "invalid_request_error"
    for field, value in [
        ("modalities", ["text", "audio"]), ("web_search_options", {}),
        ("service_tier", "priority"), ("prediction", {"type": "content", "content": "x"}),
    ]:  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=f"{field} is not supported") as refused:
            ask(**{field: value})
        assert refused.value.param == field
    with pytest.raises(openai.BadRequestError, match="Unrecognized request argument"):
        ask(extra_body={"no_such_field": 1})
    with pytest.raises(openai.BadRequestError, match="previous_response_id is not supported"):
        client.responses.create(model="fake", input="hi", previous_response_id="resp_1")
    ask(
        max_tokens=1,
        store=True,
        metadata={"a": "b"},
        modalities=["text"],
        service_tier="auto",
        tool_choice="none",
    )


def test_tokenize_and_detokenize(client: openai.OpenAI) -> None:
    def post(path: str, **body: object) -> dict:
        url = str(client.base_url).removesuffix("v1/") + path
        return json.loads(client.post(url, body=body, cast_to=str))

    text = post("tokenize", model="fake", prompt="hi", return_token_strs=True)
    assert text == {
        "count": 3, "max_model_len": 512, "tokens": [256, *b"hi"], "token_strs": ["<bos>", "h", "i"]
    }  # fmt: skip
    assert post("tokenize", prompt="", add_special_tokens=False)["tokens"] == []
    assert post("tokenize", messages=USER)["tokens"] == PROMPT
    assert post("detokenize", tokens=text["tokens"]) == {"prompt": "<bos>hi"}
    for body in ({}, {"prompt": "x", "messages": USER}):
        with pytest.raises(openai.BadRequestError, match="either"):
            post("tokenize", **body)
    with pytest.raises(openai.BadRequestError, match="tokens"):
        post("detokenize", tokens=[258])
