"""Log-probabilities over HTTP, in the shapes that clients read."""

import asyncio
import math

import pytest

COMPLETIONS = "/v1/completions"
FIELDS = {"temperature": 0, "max_tokens": 6}


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_as_lm_eval_asks(
    make_engine, serving, expected, max_tokens: int, stream: bool
) -> None:
    prompts = [[256, *b"h\xc3\xa9llo"], [5, 200, 7]]
    body = {
        "model": "fake", "prompt": prompts, "temperature": 0, "max_tokens": max_tokens,
        "logprobs": 1, "seed": 1234, "echo": True,
    }  # fmt: skip

    async def main() -> None:
        async with serving(make_engine()) as s:
            if stream:
                choices = [e["choices"][0] for e in await s.events(COMPLETIONS, body)]
            else:
                answer = (await s.post(COMPLETIONS, body)).json()
                choices = answer["choices"]
                assert answer["usage"]["completion_tokens"] == 2 * max_tokens
            for i, prompt in enumerate(prompts):
                mine = [c for c in choices if c["index"] == i]
                text = "".join(c["text"] for c in mine)
                generated = expected(prompt, max_tokens) if max_tokens else []
                assert text.startswith("<bos>h\xe9llo" if i == 0 else "\x05\ufffd\x07")
                merged = {
                    name: [value for c in mine for value in c["logprobs"][name]]
                    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
                }
                assert {len(values) for values in merged.values()} == {len(prompt) + max_tokens}
                assert merged["token_logprobs"][0] is None and merged["top_logprobs"][0] is None
                assert all(math.isfinite(x) for x in merged["token_logprobs"][1:])
                if i == 0:
                    assert merged["tokens"][:5] == ["<bos>", "h", "bytes:\\xc3", "bytes:\\xa9", "l"]
                    assert merged["text_offset"][:3] == [0, 5, 6]
                for token, value, top in zip(*list(merged.values())[:3], strict=True):
                    assert value is None or top[token] == value
                assert len(generated) == max_tokens
                assert mine[-1]["finish_reason"] == "length"

    asyncio.run(main())


def test_vllm_prompt_logprobs_and_token_names(make_engine, serving) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            body = {
                **FIELDS, "prompt": [1, 2, 3], "prompt_logprobs": 2, "logprobs": 0,
                "return_tokens_as_token_ids": True,
            }  # fmt: skip
            (choice,) = (await s.post(COMPLETIONS, body)).json()["choices"]
            first, *others = choice["prompt_logprobs"]
            assert first is None and len(others) == 2
            assert others[0]["2"].keys() == {"logprob", "rank", "decoded_token"}
            assert all(name.startswith("token_id:") for name in choice["logprobs"]["tokens"])
            assert choice["logprobs"]["top_logprobs"] is None

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_are_those_of_the_text(make_engine, serving, stream: bool) -> None:
    prompt = "日本語の猫は cute"
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "temperature": 0, "max_tokens": 9}

    async def main() -> None:
        async with serving(make_engine()) as s:
            if stream:
                choices = [e["choices"][0] for e in await s.events(COMPLETIONS, body)]
            else:
                choices = (await s.post(COMPLETIONS, body)).json()["choices"]
            text = "".join(choice["text"] for choice in choices)
            found = [at for c in choices for at in c["logprobs"]["text_offset"]]
            tokens = [token for c in choices for token in c["logprobs"]["tokens"]]
            assert text.startswith(prompt)
            assert found[tokens.index(" ")] == 6
            assert found[: 1 + 3 * 6 + 5] == [0, *(i // 3 for i in range(18)), 6, 7, 8, 9, 10]
            assert found == sorted(found) and found[-1] <= len(text) - 1
            assert found[24] == len(prompt)
            for token, at in zip(tokens[19:], found[19:], strict=True):
                assert token.startswith("bytes:") or text[at] == token

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_prompt_of_the_whole_context_can_be_echoed(
    make_engine, serving, stream: bool, logprobs: int | None
) -> None:
    body = {"prompt": [97] * 64, "echo": True, "logprobs": logprobs, "max_tokens": 0}

    async def main() -> None:
        async with serving(make_engine(max_model_len=64, num_pages=16)) as s:
            if stream:
                with_usage = {**body, "stream_options": {"include_usage": True}}
                *events, usage = await s.events(COMPLETIONS, with_usage)
                choices, usage = [e["choices"][0] for e in events], usage["usage"]
            else:
                answer = (await s.post(COMPLETIONS, body)).json()
                choices, usage = answer["choices"], answer["usage"]
            (choice,) = choices
            assert (choice["text"], choice["finish_reason"]) == ("a" * 64, "length")
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (64, 0)
            if logprobs is not None:
                assert len(choice["logprobs"]["token_logprobs"]) == 64
            refused = await s.post(COMPLETIONS, {**body, "max_tokens": 1})
            assert refused.status_code == 400 and "no room" in refused.text
            longer = {**body, "prompt": [97] * 65}
            assert (await s.post(COMPLETIONS, longer)).status_code == 400

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_the_answers_to_a_prompt_share_its_logprobs(make_engine, serving, stream: bool) -> None:
    prompts = [[1, 2, 3], [4, 5]]
    body = {
        "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 3, "n": 3, "seed": 5,
        "prompt_logprobs": 1,
    }  # fmt: skip

    async def main() -> None:
        engine = make_engine()
        async with serving(engine) as s:
            if stream:
                choices = [e["choices"][0] for e in await s.events(COMPLETIONS, body)]
            else:
                choices = (await s.post(COMPLETIONS, body)).json()["choices"]
            alone = {**body, "n": 1}
            expected = (await s.post(COMPLETIONS, alone)).json()["choices"]
            for index in range(6):
                mine = [choice for choice in choices if choice["index"] == index]
                prompt = expected[index // 3]
                size = len(prompts[index // 3])
                values = [x for c in mine for x in c["logprobs"]["token_logprobs"]]
                assert len(values) == size + 3
                assert values[:size] == prompt["logprobs"]["token_logprobs"][:size]
                assert mine[0]["prompt_logprobs"] == prompt["prompt_logprobs"] is not None
                assert all("prompt_logprobs" not in choice for choice in mine[1:])
            # Computed once per prompt: the other answers may take theirs from the cache.
            assert engine.load().num_queried_tokens == 2 * sum(map(len, prompts))

    asyncio.run(main())
