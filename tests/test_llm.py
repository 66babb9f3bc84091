"""The offline class: vLLM's shapes, streaming, and nothing left behind."""

import asyncio
import itertools
from pathlib import Path

import pytest

import jaxserve
from jaxserve import LLM, SamplingParams
from jaxserve.core.errors import InvalidRequest
from jaxserve.core.request import FinishReason
from jaxserve.testing.tiny_model import write_tiny_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory, program_cache_dir: Path) -> LLM:
    model = write_tiny_checkpoint(tmp_path_factory.mktemp("llm") / "tiny")
    return LLM(
        str(model), num_pages=64, max_num_seqs=2, max_num_batched_tokens=16,
        compilation_cache_dir=str(program_cache_dir),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM):
    yield
    load = llm.load()
    assert (load.num_running, load.num_waiting) == (0, 0)
    assert load.num_used_pages == 0


def test_public_names() -> None:
    assert sorted(jaxserve.__all__) == ["LLM", "SamplingParams"]
    with pytest.raises(AttributeError, match="nonsense"):
        jaxserve.nonsense  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_results_have_vllm_shapes_and_the_prompts_order(llm: LLM) -> None:
    prompts = ["one", {"prompt_token_ids": [256, 50, 51]}, "three, which is longer"]
    lengths = [9, 1, 4]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    results = llm.generate(prompts, params, use_tqdm=False)
    assert [r.prompt for r in results] == ["one", None, "three, which is longer"]
    assert results[0].prompt_token_ids == [256, *b"one"]
    assert [len(r.outputs[0].token_ids) for r in results] == lengths
    assert all(r.finished and r.outputs[0].finish_reason == "length" for r in results)
    for result in results:
        assert result.outputs[0].text == llm.tokenizer.decode(result.outputs[0].token_ids)
    assert len({r.request_id for r in results}) == 3


def test_one_prompt_needs_no_list(llm: LLM) -> None:
    (by_text,) = llm.generate("hi", GREEDY, use_tqdm=False)
    (by_ids,) = llm.generate({"prompt_token_ids": [256, *b"hi"]}, GREEDY, use_tqdm=False)
    assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids


def test_default_parameters_are_vllms(llm: LLM) -> None:
    (result,) = llm.generate("hi", use_tqdm=False)
    assert 1 <= len(result.outputs[0].token_ids) <= 16


def test_chat_takes_one_conversation_or_several(llm: LLM) -> None:
    hello, bye = ([{"role": "user", "content": text}] for text in ("hello", "bye"))
    (alone,) = llm.chat(hello, GREEDY, use_tqdm=False)
    both = llm.chat([hello, bye], GREEDY, use_tqdm=False)
    assert llm.tokenizer.decode(alone.prompt_token_ids) == "user: hello\nassistant:"
    assert both[0].outputs[0].token_ids == alone.outputs[0].token_ids
    assert llm.tokenizer.decode(both[1].prompt_token_ids) == "user: bye\nassistant:"


def test_it_works_inside_a_running_event_loop(llm: LLM) -> None:
    async def cell() -> str:
        return llm.generate("hi", GREEDY, use_tqdm=False)[0].outputs[0].text

    assert asyncio.run(cell()) == llm.generate("hi", GREEDY, use_tqdm=False)[0].outputs[0].text


def test_the_progress_bar_counts_requests(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b", "c"], GREEDY)
    assert "3/3" in capsys.readouterr().err
    llm.generate(["a", "b", "c"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([{"text": "x"}], None, "a prompt is a string or"),
        (["fine", {"prompt_token_ids": []}], None, "the prompt is empty"),
        (["fine", "x" * 600], None, "leaves no room"),
        (["one", "two"], [GREEDY], "1 sampling_params for 2 prompts"),
    ],
)
def test_a_bad_call_leaves_nothing_queued(llm: LLM, prompts, params, message: str) -> None:
    before = llm.load().num_generated_tokens
    with pytest.raises(InvalidRequest, match=message):
        llm.generate(prompts, params, use_tqdm=False)
    assert llm.load().num_generated_tokens == before
    assert llm.generate("fine", GREEDY, use_tqdm=False)[0].finished


def test_a_stream_adds_up_to_the_result(llm: LLM) -> None:
    deltas = list(llm.stream("hello", GREEDY))
    (result,) = llm.generate("hello", GREEDY, use_tqdm=False)
    assert "".join(d.text for d in deltas) == result.outputs[0].text
    assert [i for d in deltas for i in d.token_ids] == result.outputs[0].token_ids
    assert [d.finish_reason for d in deltas] == [None] * 7 + [FinishReason.LENGTH]


def test_closing_a_stream_aborts_its_request(llm: LLM) -> None:
    aborted = llm.load().num_aborted
    stream = llm.stream("hello", SamplingParams(max_tokens=400, ignore_eos=True))
    assert len(list(itertools.islice(stream, 3))) == 3
    assert llm.load().num_running == 1
    stream.close()
    assert llm.load().num_aborted == aborted + 1


def test_a_stream_loses_nothing_to_calls_in_between(llm: LLM) -> None:
    expected = [d.token_ids for d in llm.stream("hello", GREEDY)]
    stream = llm.stream("hello", GREEDY)
    got = [next(stream).token_ids]
    llm.generate(["between", "them"], GREEDY, use_tqdm=False)
    got += [d.token_ids for d in stream]
    assert got == expected
