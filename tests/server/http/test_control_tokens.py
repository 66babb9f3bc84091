"""Control tokens spelled out by a caller: tokens in a plain text, text in a conversation."""

import asyncio

EOS = 257
MESSAGES = [{"role": "user", "content": "a<eos>b"}]
PROMPT = [256, *b"user: a<eos>b\nassistant:"]


def test_control_tokens(make_engine, serving, expected) -> None:
    async def main() -> None:
        engine = make_engine()
        async with serving(engine) as s:
            answer = await s.post("/tokenize", {"prompt": "a<eos>b"})
            assert answer.json()["tokens"] == [256, 97, EOS, 98]
            answer = await s.post("/tokenize", {"messages": MESSAGES})
            assert answer.json()["tokens"] == PROMPT
            body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 4}
            answer = (await s.post("/v1/chat/completions", body)).json()
            assert answer["usage"]["prompt_tokens"] == len(PROMPT)
            text = bytes(expected(PROMPT, 4)).decode(errors="replace")
            assert answer["choices"][0]["message"]["content"] == text
            body = {"input": "a<eos>b", "temperature": 0, "max_output_tokens": 4}
            answer = (await s.post("/v1/responses", body)).json()
            assert answer["usage"]["input_tokens"] == len(PROMPT)
            engine.tokenizer.parses_special_in_chat = True
            answer = await s.post("/tokenize", {"messages": MESSAGES})
            assert answer.json()["tokens"].count(EOS) == 1

    asyncio.run(main())
