"""Blanks in JSON, and what `strict` promises."""

import asyncio
from typing import Any

from jaxserve.testing.fake_executor import FakeModel


def test_blanks_between_the_parts_of_json(make_engine, serving) -> None:
    body = {"prompt": "hi", "max_tokens": 60, "seed": 3}
    schema = {"enum": [{"a": [1, 2]}]}

    async def main() -> None:
        async with serving(make_engine(model=FakeModel(vocab_size=272))) as s:

            async def text(**fields: Any) -> str:
                response = await s.post("/v1/completions", {**body, **fields})
                assert response.status_code == 200, response.text
                return response.json()["choices"][0]["text"]

            compact = {"json": schema, "disable_any_whitespace": True}
            assert await text(structured_outputs=compact) == '{"a":[1,2]}'
            wide = {"json": schema, "whitespace_pattern": "--"}
            assert set(await text(structured_outputs=wide)) >= set('{"a":[1,2]}')
            assert await text(guided_json=schema, guided_whitespace_pattern="") == '{"a":[1,2]}'
            pattern = "guided_whitespace_pattern"
            for fields, param in [
                ({"guided_regex": "a", pattern: ""}, pattern),
                ({"structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs."),
                ({"structured_outputs": wide, pattern: ""}, pattern),
            ]:
                status, error = await s.refusal("/v1/completions", {**body, **fields})
                assert status == 400 and error["param"].startswith(param), error

    asyncio.run(main())


def test_strict_is_a_promise(make_engine, serving) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "maxItems": 2}

    async def main() -> None:
        async with serving(make_engine(max_model_len=2048, num_pages=200)) as s:
            for strict in (False, True):
                form = {"name": "a", "schema": schema, "strict": strict}
                chat = {
                    "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3,
                    "response_format": {"type": "json_schema", "json_schema": form},
                }  # fmt: skip
                tool = {"name": "f", "strict": strict, "parameters": {"properties": {"a": schema}}}
                call = {
                    "messages": chat["messages"], "max_tokens": 3, "tool_choice": "required",
                    "tools": [{"type": "function", "function": tool}],
                }  # fmt: skip
                for body in (chat, call):
                    response = await s.post("/v1/chat/completions", body)
                    assert response.status_code == (400 if strict else 200), response.text
                    assert ("uniqueItems" in response.text) == strict

    asyncio.run(main())
