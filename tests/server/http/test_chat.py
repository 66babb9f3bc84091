"""`/v1/chat/completions`, byte for byte."""

import asyncio

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 8}
PROMPT = [256, *b"user: hi\nassistant:"]


def test_an_answer(make_engine, serving, expected) -> None:
    text = bytes(expected(PROMPT, 8)).decode(errors="replace")

    async def main() -> None:
        async with serving(make_engine()) as s:
            response = await s.post(CHAT, HELLO)
            answer = response.json()
            assert response.status_code == 200 and response.headers["x-request-id"]
            assert answer["id"].startswith("chatcmpl-") and answer["model"] == "fake"
            assert answer["object"] == "chat.completion"
            assert answer["choices"] == [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": None,
                    "finish_reason": "length",
                    "stop_reason": None,
                }
            ]
            assert answer["usage"] == {
                "prompt_tokens": len(PROMPT),
                "completion_tokens": 8,
                "total_tokens": len(PROMPT) + 8,
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 0},
            }

    asyncio.run(main())


def test_a_stream_is_as_openai_sends_it(make_engine, serving, expected) -> None:
    text = bytes(expected(PROMPT, 8)).decode(errors="replace")

    async def main() -> None:
        async with serving(make_engine()) as s:
            events = await s.events(CHAT, {**HELLO, "stream_options": {"include_usage": True}})
            head = {key: events[0][key] for key in ("id", "object", "created", "model")}
            assert head["object"] == "chat.completion.chunk"
            assert all({key: event[key] for key in head} == head for event in events)
            *chunks, usage = events
            assert all(event["usage"] is None for event in chunks)
            assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 8
            choices = [event["choices"][0] for event in chunks]
            assert choices[0]["delta"] == {"role": "assistant", "content": ""}
            assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "length"
            assert all(choice["finish_reason"] is None for choice in choices[:-1])
            assert "".join(choice["delta"]["content"] for choice in choices[:-1]) == text
            plain = await s.events(CHAT, HELLO)
            assert all("usage" not in event for event in plain)
            assert "".join(e["choices"][0]["delta"].get("content", "") for e in plain) == text

    asyncio.run(main())


def test_refusals(make_engine, serving) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            for body, param, words in [
                ({}, "messages", "required"),
                ({**HELLO, "foo": 1, "bar": 2}, "foo", "Unrecognized request arguments supplied"),
                ({**HELLO, "audio": {}}, "audio", "not supported"),
                ({**HELLO, "temperature": "hot"}, "temperature", "number"),
                ({**HELLO, "messages": [{"role": "user"}]}, "messages[0].content", "required"),
                ({**HELLO, "n": 1000}, "n", "more than"),
            ]:
                status, error = await s.refusal(CHAT, body)
                assert status == 400 and error["type"] == "invalid_request_error", error
                assert error["param"] == param and words in error["message"], error
            status, error = await s.refusal(CHAT, {**HELLO, "model": "other"})
            assert status == 404 and error["code"] == "model_not_found"

    asyncio.run(main())
