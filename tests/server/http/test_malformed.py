"""Bodies that are no requests at all."""

import asyncio
import json

import httpx
import pytest

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b'{"messages": 1}', b"[" * 100_000,
        b'{"a":' * 50_000, b"1" * 5000, b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}',
        b'{"messages":[{"role":"user","content":"x"}],"temperature":1e999}',
        b'{"messages":[{"role":"user","content":"x"}],"seed":1e3}',
        b'{"messages":[{"role":"user","content":"x"}],"seed":100000000000000000000000}',
        b'{"messages":[{"role":"user","content":"x"}],"stop":{"a":1}}',
        b'{"messages":[{"role":"user","content":"x"}],"\\ud800":1}',
        b'{"messages":[{"role":"user","content":[{"type":"image_url","image_url":"x"}]}]}',
        b'{"messages":[{"role":"user","content":"x"}],"response_format":{"type":"json_schema"}}',
        b'{"messages":[{"role":"user","content":"x"}],"guided_choice":[]}',
        b'{"messages":[{"role":"user","content":"x"}],"guided_regex":"a","guided_choice":["a"]}',
    ],
)  # fmt: skip
def test_is_a_400_in_openais_shape(base_url: str, content: bytes) -> None:
    response = httpx.post(base_url + CHAT, content=content, headers=JSON, trust_env=False)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["message"] and error["type"] == "invalid_request_error"
    assert len(response.content) < 2000 and response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("prompt", "param"),
    [(5, "prompt"), ({"a": 1}, "prompt"), ([1, "a"], "prompt[1]"), (["a", 1], "prompt[1]"),
     ([[1], "a"], "prompt[1]"), ([[1, 2.5]], "prompt[0][1]"), ([None] * 1000, "prompt[0]"),
     ([True], "prompt[0]"), ([2**31], "prompt[0]")],
)  # fmt: skip
def test_the_place_of_an_error_is_named(base_url: str, prompt: object, param: str) -> None:
    response = httpx.post(f"{base_url}/v1/completions", json={"prompt": prompt}, trust_env=False)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param, error
    assert error["message"].startswith(f"{param}: ")


def test_both_names_of_one_field_are_named(base_url: str) -> None:
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 5,
        "max_completion_tokens": 6,
    }
    response = httpx.post(base_url + CHAT, json=body, trust_env=False)
    message = response.json()["error"]["message"]
    assert message.startswith("max_tokens and max_completion_tokens are the same")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "guided_regex": "\ud800"},
         "guided_regex"),
        ("/v1/completions", {"prompt": "\ud800"}, "prompt"),
        ("/v1/responses", {"input": "\ud800"}, "input"),
        ("/v1/embeddings", {"input": ["a", "\ud800"]}, "input"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
    ],
)  # fmt: skip
def test_whose_text_is_not_unicode(base_url: str, path: str, body: dict, param: str) -> None:
    content = json.dumps(body).encode()
    response = httpx.post(base_url + path, content=content, headers=JSON, trust_env=False)
    error = response.json()["error"]
    assert response.status_code == 400 and "not valid Unicode" in error["message"]
    assert error["param"] == param, error


def test_unknown_routes_methods_and_types(make_engine, serving) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            for response, status in [
                (await s.client.get("/v1/nothing"), 404),
                (await s.client.get(CHAT), 405),
                (await s.client.post(CHAT, content=b"{}"), 415),
                (await s.client.post(CHAT, data={"a": "b"}), 415),
                (await s.client.post(CHAT, json={}, headers={"X-Request-Id": "a b"}), 400),
                (await s.client.post(CHAT, json={}, headers={"X-Request-Id": "x" * 300}), 400),
            ]:
                assert response.status_code == status and response.json()["error"]["message"]
            named = await s.client.get("/health", headers={"X-Request-Id": "mine"})
            assert named.headers["x-request-id"] == "mine"

    asyncio.run(main())


def test_a_bug_is_500_and_tells_the_client_nothing(
    make_engine, serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def bug(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("jaxserve.server.http.chat.conversation_prompt", bug)

    async def main() -> None:
        async with serving(make_engine()) as s:
            body = {"messages": [{"role": "user", "content": "hi"}]}
            status, error = await s.refusal(CHAT, body)
            assert status == 500 and error["type"] == "server_error"
            assert "secret" not in error["message"]

    asyncio.run(main())
    assert "secret" in caplog.text
