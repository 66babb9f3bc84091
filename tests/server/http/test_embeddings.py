"""`/v1/embeddings`, by the openai package and by itself."""

import asyncio
import base64
import dataclasses

import httpx
import numpy as np
import openai
import pytest

EMBEDDINGS = "/v1/embeddings"


def test_the_openai_package(base_url: str) -> None:
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        # The client asks for base64 by itself and decodes it.
        texts = client.embeddings.create(model="fake", input=["hello", "you"])
        assert [item.index for item in texts.data] == [0, 1]
        assert texts.usage.prompt_tokens == texts.usage.total_tokens == 6 + 4
        tokens = client.embeddings.create(model="fake", input=[[256, *b"hello"]])
        assert tokens.data[0].embedding == texts.data[0].embedding != texts.data[1].embedding
        numbers = client.embeddings.create(model="fake", input="hello", encoding_format="float")
        assert numbers.data[0].embedding == pytest.approx(texts.data[0].embedding)
        assert np.linalg.norm(numbers.data[0].embedding) == pytest.approx(1)
        with pytest.raises(openai.BadRequestError, match="the model says of no size"):
            client.embeddings.create(model="fake", input="hello", dimensions=2)
        with pytest.raises(openai.BadRequestError, match="input"):
            client.embeddings.create(model="fake", input=[])
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model="fake", input=[[1], [100_000], [2]])


def test_the_bytes_of_base64(base_url: str) -> None:
    body = {"input": "hello", "encoding_format": "base64", "user": "me"}
    item = httpx.post(base_url + EMBEDDINGS, json=body, trust_env=False).json()["data"][0]
    values = np.frombuffer(base64.b64decode(item["embedding"]), "<f4")
    assert np.linalg.norm(values) == pytest.approx(1)


def test_a_client_that_goes_away_frees_its_pages(make_engine, serving, wait_idle) -> None:
    async def main() -> None:
        engine = make_engine(step_seconds=0.1, max_num_batched_tokens=32)
        async with serving(engine) as s:
            with pytest.raises(httpx.ReadTimeout):
                await s.post(EMBEDDINGS, {"input": [[1] * 400] * 3}, timeout=0.15)
            await wait_idle(engine)
            assert engine.load().num_aborted == 3
            assert await s.context.wait_idle(1)

    asyncio.run(main())


@pytest.mark.parametrize("declared", [(), (1, 4)])
def test_dimensions_of_a_model_that_was_trained_for_them(
    make_engine, serving, declared: tuple[int, ...]
) -> None:
    async def main() -> None:
        engine = make_engine()
        info = dataclasses.replace(
            engine.model_info, is_matryoshka=True, matryoshka_dimensions=declared
        )
        engine._engine.info = info
        async with serving(engine) as s:
            whole = (await s.post(EMBEDDINGS, {"input": "hello"})).json()["data"][0]["embedding"]
            body = {"input": "hello", "dimensions": 1}
            cut = (await s.post(EMBEDDINGS, body)).json()["data"][0]["embedding"]
            assert len(whole) == 2 and cut == [pytest.approx(np.sign(whole[0]))]
            for size in (3, 4, 0, "1"):
                status, error = await s.refusal(EMBEDDINGS, {"input": "a", "dimensions": size})
                assert status == 400 and error["param"] == "dimensions"
            if declared:
                _, error = await s.refusal(EMBEDDINGS, {"input": "a", "dimensions": 2})
                assert "may be cut to 1, 4" in error["message"]

    asyncio.run(main())


def test_as_many_texts_as_openai_takes_do_not_fill_the_queue(make_engine, serving) -> None:
    async def main() -> None:
        engine = make_engine(max_waiting=8, max_num_seqs=4, step_seconds=0)
        async with serving(engine) as s:
            answer = await s.post(EMBEDDINGS, {"input": ["a"] * 2048})
            assert len(answer.json()["data"]) == 2048
            status, error = await s.refusal(EMBEDDINGS, {"input": ["a"] * 2049})
            assert status == 400 and "2049 is more than the 2048 allowed" in error["message"]

    asyncio.run(main())


def test_a_text_of_the_whole_context_has_an_embedding(make_engine, serving) -> None:
    async def main() -> None:
        async with serving(make_engine(max_model_len=64, num_pages=16)) as s:
            answer = await s.post(EMBEDDINGS, {"input": [[1] * 64]})
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["prompt_tokens"] == 64
            refused = await s.post(EMBEDDINGS, {"input": [[1] * 65]})
            assert refused.status_code == 400

    asyncio.run(main())
