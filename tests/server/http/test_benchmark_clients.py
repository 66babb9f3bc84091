"""What benchmarks and evaluations send, field for field, and what they read of the answers."""

import json

import httpx
import pytest

# `vllm bench serve`, backends openai and openai-chat: in benchmarks/lib/endpoint_request_func.py
VLLM_COMPLETIONS = {
    "model": "fake", "prompt": "hello", "repetition_penalty": 1.0, "max_tokens": 12,
    "logprobs": None, "stream": True, "stream_options": {"include_usage": True},
    "ignore_eos": True, "temperature": 0.0, "top_p": 1.0, "top_k": -1,
}  # fmt: skip
VLLM_CHAT = {
    "model": "fake", "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
    "max_completion_tokens": 12, "stream": True, "stream_options": {"include_usage": True},
    "ignore_eos": True, "temperature": 0.0,
}  # fmt: skip

# guidellm 0.8, its three text formats.
GUIDELLM_COMPLETIONS = {
    "model": "fake", "prompt": "hello", "max_tokens": 12, "stop": None, "ignore_eos": True,
    "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}  # fmt: skip
GUIDELLM_CHAT = {
    "model": "fake", "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
    "max_completion_tokens": 12, "stop": None, "ignore_eos": True, "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", VLLM_COMPLETIONS),
        ("/v1/chat/completions", VLLM_CHAT),
        ("/v1/completions", GUIDELLM_COMPLETIONS),
        ("/v1/chat/completions", GUIDELLM_CHAT),
    ],
)
def test_load_generators(base_url: str, path: str, body: dict) -> None:
    headers = {"x-request-id": "benchmark-serving0", "Authorization": "Bearer none"}
    running = []
    with httpx.stream(
        "POST", base_url + path, json=body, headers=headers, trust_env=False
    ) as response:
        assert response.status_code == 200
        assert response.headers["x-request-id"] == "benchmark-serving0"
        usage: dict[str, int] = {}
        num_choices = 0
        for line in response.iter_lines():
            if not line or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if event["choices"]:
                num_choices += 1
                running.append(event["usage"] and event["usage"]["completion_tokens"])
            else:
                usage = event["usage"]
    assert line == "" and num_choices
    assert usage["completion_tokens"] == 12 and usage["prompt_tokens"] > 5
    if body["stream_options"].get("continuous_usage_stats"):
        assert running == sorted(running) and running[-1] == 12
    else:
        assert not any(running)


def test_lm_eval_generation(base_url: str) -> None:
    """As `lm_eval --model local-completions` asks for generate_until tasks."""
    body = {
        "prompt": [[1, 2, 3], [4, 5]], "model": "fake", "max_tokens": 8, "temperature": 0,
        "stop": ["\n\n", "Question:"], "seed": 1234,
    }  # fmt: skip
    response = httpx.post(f"{base_url}/v1/completions", json=body, trust_env=False)
    choices = response.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert all(choice["text"] for choice in choices)


def test_lm_eval_remote_tokenizer(base_url: str) -> None:
    """As `tokenizer_backend=remote` asks, whose special tokens are looked up by their names."""
    info = httpx.get(f"{base_url}/tokenizer_info", trust_env=False).json()
    assert "content" in info["chat_template"] and info["tokenizer_class"]
    body = {"prompt": info["eos_token"], "add_special_tokens": False}
    tokens = httpx.post(f"{base_url}/tokenize", json=body, trust_env=False).json()["tokens"]
    text = httpx.post(f"{base_url}/detokenize", json={"tokens": tokens}, trust_env=False).json()
    assert text == {"prompt": info["eos_token"]}
