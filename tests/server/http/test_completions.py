"""`/v1/completions`: forms of prompts, echo, log-probabilities, several choices."""

import asyncio
from typing import ClassVar

from jaxserve.server.limits import RequestLimits
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

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


def test_best_of_is_n(make_engine, serving) -> None:
    async def main() -> None:
        async with serving(make_engine()) as s:
            body = {**FIELDS, "prompt": "hi"}
            for fields in ({"best_of": 2, "n": 2}, {"best_of": 1}):
                answer = (await s.post(COMPLETIONS, {**body, **fields})).json()
                assert len(answer["choices"]) == fields["best_of"]
            status, error = await s.refusal(COMPLETIONS, {**body, "best_of": 2})
            assert status == 400 and error["param"] == "best_of" and "n 1" in error["message"]

    asyncio.run(main())


class MiddleTokenizer(ByteTokenizer):
    """Has StarCoder's names for three tokens of a byte each, and one that ends a file."""

    IDS: ClassVar[dict[str, int]] = {
        "<fim_prefix>": 1, "<fim_suffix>": 2, "<fim_middle>": 3, "<file_sep>": 4
    }  # fmt: skip

    def token_to_id(self, token: str) -> int | None:
        return self.IDS.get(token, super().token_to_id(token))


def test_a_suffix_goes_behind_the_gap(make_engine, serving, expected) -> None:
    engine = make_engine()
    engine._engine.tokenizer = MiddleTokenizer()

    async def main() -> None:
        async with serving(engine) as s:
            body = {**FIELDS, "suffix": "b", "return_token_ids": True}
            for prompt, ids in (
                ("a", [256, 1, *b"a", 2, *b"b", 3]),  # BOS stays in front of all
                ([*b"xy"], [1, *b"xy", 2, *b"b", 3]),
            ):
                answer = (await s.post(COMPLETIONS, {**body, "prompt": prompt})).json()
                (choice,) = answer["choices"]
                assert choice["prompt_token_ids"] == ids
                assert choice["token_ids"] == expected(ids, 6)
            # What ends a file ends the middle; not if the model's own end is ignored.
            ends = {"logit_bias": {"4": 100}, "prompt": "a"}
            for ignore_eos, reason in ((False, "stop"), (True, "length")):
                fields = {**body, **ends, "ignore_eos": ignore_eos}
                answer = (await s.post(COMPLETIONS, fields)).json()
                assert answer["choices"][0]["finish_reason"] == reason
            status, error = await s.refusal(COMPLETIONS, {**body, "prompt": "a", "echo": True})
            assert status == 400 and error["param"] == "suffix"

    asyncio.run(main())
