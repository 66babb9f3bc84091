"""`/v1/completions`: forms of prompts, echo, log-probabilities, several choices."""

import asyncio

from jaxserve.server.limits import RequestLimits

COMPLETIONS = "/v1/completions"
PROMPT = [256, *b"hi"]
FIELDS = {"temperature": 0, "max_tokens": 6}


def decoded(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def test_every_form_of_prompt(make_engine, serving, expected) -> None:
    answer, other = decoded(expected(PROMPT, 6)), decoded(expected([7, 8], 6))

    async def main() -> None:
        async with serving(make_engine()) as s:
            for prompt, texts in [
                ("hi", [answer]),
                (["hi"], [answer]),
                (PROMPT, [answer]),
                ([PROMPT, [7, 8]], [answer, other]),
            ]:
                body = (await s.post(COMPLETIONS, {**FIELDS, "prompt": prompt})).json()
                assert [c["text"] for c in body["choices"]] == texts
                assert [c["index"] for c in body["choices"]] == list(range(len(texts)))
                assert body["object"] == "text_completion"
            assert body["usage"]["prompt_tokens"] == 5
            assert body["usage"]["completion_tokens"] == 12
            plain = (await s.post(COMPLETIONS, {"prompt": "hi"})).json()
            assert plain["usage"]["completion_tokens"] == 16  # OpenAI's default

    asyncio.run(main())


def test_choices_have_seeds_of_their_own(make_engine, serving) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            fields = {"prompt": [[1, 2], [3, 4]], "max_tokens": 6, "return_token_ids": True}
            several = (await s.post(COMPLETIONS, {**fields, "n": 3, "seed": 5})).json()
            assert several["usage"]["prompt_tokens"] == 4
            answers = []
            for seed in (5, 6, 7):
                one = (await s.post(COMPLETIONS, {**fields, "seed": seed})).json()
                answers.append([c["token_ids"] for c in one["choices"]])
            expected = [answers[j][p] for p in range(2) for j in range(3)]
            assert [c["token_ids"] for c in several["choices"]] == expected
            assert len({tuple(ids) for ids in expected}) == 6
            events = await s.events(COMPLETIONS, {**fields, "n": 3, "seed": 5})
            streamed: list[list[int]] = [[] for _ in range(6)]
            for event in events:
                (choice,) = event["choices"]
                streamed[choice["index"]] += choice["token_ids"]
                prompt = fields["prompt"][choice["index"] // 3]
                assert choice.get("prompt_token_ids", prompt) == prompt
            assert streamed == expected
            assert sum("prompt_token_ids" in e["choices"][0] for e in events) == 6

    asyncio.run(main())


def test_refusals(make_engine, serving) -> None:
    async def main() -> None:
        async with serving(make_engine(), limits=RequestLimits(max_prompts=2)) as s:
            for body, param in [
                ({}, "prompt"),
                ({"prompt": None}, "prompt"),
                ({"prompt": ""}, "prompt"),
                ({"prompt": []}, "prompt"),
                ({"prompt": [[]]}, "prompt"),
                ({"prompt": ["a", "b", "c"]}, "prompt"),
                ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
                ({"prompt": "x", "best_of": 3}, "best_of"),
                ({"prompt": "x", "suffix": "y"}, "suffix"),
                ({"prompt": "x", "logit_bias": {"x": 1}}, "logit_bias"),
                ({"prompt": "x", "logit_bias": {"258": 1}}, "logit_bias"),
                ({"prompt": "x", "allowed_token_ids": [300]}, "allowed_token_ids"),
                ({"prompt": "x", "stream_options": {}}, "stream_options"),
                ({"prompt": "x", "request_id": "a b"}, "request_id"),
                ({"prompt": [-1]}, None),
                ({"prompt": [1], "logprobs": 21}, None),
                ({"prompt": [1] * 600}, "prompt"),
            ]:
                status, error = await s.refusal(COMPLETIONS, body)
                assert status == 400 and (param is None or error["param"] == param), (body, error)
            fine = {"best_of": 1, "suffix": None, "use_beam_search": False, "stop": None}
            assert (await s.post(COMPLETIONS, {"prompt": "x", **fine})).status_code == 200

    asyncio.run(main())
