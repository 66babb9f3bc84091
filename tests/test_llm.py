"""The offline class: vLLM's shapes, streaming, and nothing left behind."""

import asyncio
import contextlib
import ctypes
import dataclasses
import itertools
import random
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxserve
from jaxserve import LLM, Grammar, SamplingParams
from jaxserve.core.errors import InvalidRequest
from jaxserve.core.request import FinishReason
from jaxserve.testing.fake_engine import fake_sync_engine
from jaxserve.testing.tiny_model import write_tiny_checkpoint

pytestmark = pytest.mark.usefixtures("quick_compiles")

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory, program_cache_dir: Path) -> LLM:
    model = write_tiny_checkpoint(tmp_path_factory.mktemp("llm") / "tiny")
    return LLM(
        str(model), num_pages=64, max_num_seqs=2, max_num_batched_tokens=16,
        compilation_cache_dir=str(program_cache_dir), json_whitespace="compact",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM):
    yield
    load = llm.load()
    assert (load.num_running, load.num_waiting) == (0, 0)
    assert load.num_used_pages == 0


def test_public_names() -> None:
    assert sorted(jaxserve.__all__) == ["Grammar", "LLM", "SamplingParams"]
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


def test_control_tokens_in_a_chat_are_text(llm: LLM) -> None:
    (result,) = llm.chat([{"role": "user", "content": "a<eos>"}], GREEDY, use_tqdm=False)
    assert result.prompt_token_ids == [256, *b"user: a<eos>\nassistant:"]
    llm.tokenizer.parses_special_in_chat = True
    (result,) = llm.chat([{"role": "user", "content": "a<eos>"}], GREEDY, use_tqdm=False)
    llm.tokenizer.parses_special_in_chat = False
    assert result.prompt_token_ids == [256, *b"user: a", 257, *b"\nassistant:"]


def test_the_engines_layout_of_json(llm: LLM) -> None:
    schema = '{"enum": [{"a": [1, "b"]}]}'
    for whitespace, text in ((None, '{"a":[1,"b"]}'), (" {2}", None)):
        grammar = Grammar("json_schema", schema, whitespace=whitespace)
        params = SamplingParams(grammar=grammar, max_tokens=60, seed=1)
        (result,) = llm.generate("x", params, use_tqdm=False)
        assert result.outputs[0].finish_reason == "stop"
        assert text in (None, result.outputs[0].text)
        assert "".join(result.outputs[0].text.split()) == '{"a":[1,"b"]}'


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


# Everything that can be asked for.


def test_several_answers_to_a_prompt(llm: LLM) -> None:
    params = SamplingParams(temperature=1, seed=5, max_tokens=6, ignore_eos=True)
    results = llm.generate(["one", "two"], params, n=3, use_tqdm=False)
    for result in results:
        assert result.finished and [output.index for output in result.outputs] == [0, 1, 2]
        assert len({tuple(output.token_ids) for output in result.outputs}) == 3
    second = dataclasses.replace(params, seed=6)
    (alone,) = llm.generate("one", second, use_tqdm=False)
    assert alone.outputs[0].token_ids == results[0].outputs[1].token_ids
    with pytest.raises(InvalidRequest, match="n must be at least 1"):
        llm.generate("one", params, n=0, use_tqdm=False)


def test_logprobs_have_vllms_shape(llm: LLM) -> None:
    params = dataclasses.replace(GREEDY, logprobs=3, prompt_logprobs=2)
    (result,) = llm.generate("hello", params, n=2, use_tqdm=False)
    for output in result.outputs:
        assert output.logprobs is not None and len(output.logprobs) == 8
        for token, at in zip(output.token_ids, output.logprobs, strict=True):
            assert len(at) == 3 and next(iter(at)) == token  # greedy: it is the likeliest
            assert [entry.rank for entry in at.values()] == [1, 2, 3]
            assert at[token].decoded_token == llm.tokenizer.decode([token])
        total = sum(at[t].logprob for t, at in zip(output.token_ids, output.logprobs, strict=True))
        assert output.cumulative_logprob == pytest.approx(total)
    assert result.prompt_logprobs is not None
    first, *rest = result.prompt_logprobs
    assert first is None and len(rest) == 5
    for token, at in zip(result.prompt_token_ids[1:], rest, strict=True):
        assert at is not None and token in at and 2 <= len(at) <= 3
    (plain,) = llm.generate("hello", GREEDY, use_tqdm=False)
    assert plain.prompt_logprobs is None and plain.outputs[0].logprobs is None
    assert plain.outputs[0].token_ids == result.outputs[0].token_ids


def test_prompt_logprobs_are_those_of_the_answer(llm: LLM) -> None:
    """Given back as a prompt, an answer's tokens are as likely as they were."""
    params = dataclasses.replace(GREEDY, logprobs=0, prompt_logprobs=0)
    (said,) = llm.generate("what", params, use_tqdm=False)
    prompt = said.prompt_token_ids + said.outputs[0].token_ids
    (scored,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    assert said.outputs[0].logprobs and scored.prompt_logprobs
    for before, after in zip(said.outputs[0].logprobs, scored.prompt_logprobs[-8:], strict=True):
        assert after is not None
        (token,) = before
        assert after[token].logprob == pytest.approx(before[token].logprob, abs=1e-4)
        assert after[token].rank == before[token].rank == 1


def test_grammars(llm: LLM) -> None:
    params = SamplingParams(temperature=1, max_tokens=40, grammar=Grammar.choice(["yes", "no"]))
    results = llm.generate(["a", "b", "c", "d"], params, n=3, use_tqdm=False)
    assert {output.text for result in results for output in result.outputs} <= {"yes", "no"}
    with pytest.raises(InvalidRequest, match="unclosed group"):
        llm.generate("a", SamplingParams(grammar=Grammar("regex", "(a")), use_tqdm=False)


def test_what_ended_an_answer(llm: LLM) -> None:
    (free,) = llm.generate("hi", GREEDY, use_tqdm=False)
    token = free.outputs[0].token_ids[3]
    at = free.outputs[0].token_ids.index(token)
    params = dataclasses.replace(GREEDY, stop_token_ids=(token,))
    (stopped,) = llm.generate("hi", params, use_tqdm=False)
    assert stopped.outputs[0].stop_reason == token
    assert stopped.outputs[0].token_ids == free.outputs[0].token_ids[: at + 1]


def test_an_answer_that_cannot_go_on_leaves_the_others(llm: LLM) -> None:
    stuck = SamplingParams(allowed_token_ids=(97,), grammar=Grammar("regex", "ab+"))
    bad, good = llm.generate(["x", "y"], [stuck, GREEDY], use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error" and bad.outputs[0].text == "a"
    assert "no token can come next" in (bad.outputs[0].error or "")
    assert good.outputs[0].finish_reason == "length" and good.outputs[0].error is None


def test_embeddings(llm: LLM) -> None:
    texts = ["the same words", "the same words", "x" * 100, {"prompt_token_ids": [1]}]
    results = llm.embed(texts, use_tqdm=False)
    vectors = np.stack([result.outputs.embedding for result in results])
    assert vectors.shape == (4, 32) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
    assert abs(vectors[0] @ vectors[2]) < 0.99
    (alone,) = llm.embed("x" * 100, use_tqdm=False)
    np.testing.assert_allclose(alone.outputs.embedding, vectors[2], atol=1e-5)
    with pytest.raises(InvalidRequest, match="more than fits in the context of 512"):
        llm.embed(["fine", {"prompt_token_ids": [1] * 513}], use_tqdm=False)
    (whole,) = llm.embed({"prompt_token_ids": [1] * 512}, use_tqdm=False)
    assert np.linalg.norm(whole.outputs.embedding) == pytest.approx(1)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-1, 300),
    st.floats(),
    st.text(max_size=3),
    st.characters(categories=["Cs"]),
    st.binary(max_size=2),
    st.sampled_from(
        [2**200, 1j, np.int64(3), np.float32(1.0), np.bool_(True), np.array([1, 2]), object(),
         np.array([1.5]), np.array(3), {"prompt_token_ids": np.array([1, 2])}]
    ),
)  # fmt: skip
ODDS = st.recursive(
    ODD,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.integers(-1, 300), st.text(max_size=2)), inner, max_size=2),
        st.builds(lambda value: {"prompt_token_ids": value}, inner),
    ),
    max_leaves=4,
)
FIELDS = [field.name for field in dataclasses.fields(SamplingParams)]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FIELDS), ODDS)
def test_odd_params_are_served_or_refused(llm: LLM, field: str, value: Any) -> None:
    try:
        fields: Any = {"max_tokens": 2, field: value}
        params = SamplingParams(**fields)
        llm.generate({"prompt_token_ids": [1, 2]}, params, use_tqdm=False)
    except InvalidRequest:
        pass
    assert llm.load().num_used_pages == 0


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["generate", "embed", "chat", "n", "sampling_params"]), ODDS)
def test_odd_prompts_are_served_or_refused(llm: LLM, call: str, value: Any) -> None:
    two = SamplingParams(max_tokens=2)
    try:
        if call in ("n", "sampling_params"):
            size = {"n": min(value, 3) if type(value) is int else value}
            more: Any = size if call == "n" else {call: value}
            llm.generate({"prompt_token_ids": [1]}, use_tqdm=False, **more)
        elif call == "embed":
            llm.embed(value, use_tqdm=False)
        else:
            getattr(llm, call)(value, two, use_tqdm=False)
    except InvalidRequest:
        pass
    assert llm.load().num_used_pages == 0


@pytest.mark.parametrize("value", [np.array([1, 2]), np.array([]), np.int64(3), {1: b""}, {1}])
@pytest.mark.parametrize("role", ["user", "assistant", "tool"])
def test_messages_are_what_json_can_hold(llm: LLM, role: str, value: Any) -> None:
    for field in ("role", "content", "tool_calls", "name", "reasoning"):
        message: Any = {"role": role, "content": "hi"} | {field: value}
        with pytest.raises(InvalidRequest, match="messages must be what JSON can hold"):
            llm.chat([message], GREEDY, use_tqdm=False)
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": value}}]
    with pytest.raises(InvalidRequest, match="tools must be what JSON can hold"):
        llm.chat([{"role": "user", "content": "hi"}], GREEDY, tools=tools, use_tqdm=False)


def test_integers_of_numpy_are_integers(llm: LLM) -> None:
    plain = llm.generate({"prompt_token_ids": [1, 2, 3]}, GREEDY, use_tqdm=False)
    given: Any = {
        "temperature": np.float32(0), "max_tokens": np.int64(8), "ignore_eos": np.bool_(True),
    }  # fmt: skip
    params = SamplingParams(**given)
    by_array = llm.generate({"prompt_token_ids": np.array([1, 2, 3])}, params, use_tqdm=False)
    assert by_array[0].outputs[0].token_ids == plain[0].outputs[0].token_ids
    for wrong in ([1.0], np.array([1.0]), [True], "12", [[1]]):
        with pytest.raises(InvalidRequest, match="prompt_token_ids must be"):
            llm.generate({"prompt_token_ids": wrong}, GREEDY, use_tqdm=False)
    given = {"logprobs": 1.5}
    with pytest.raises(InvalidRequest, match=r"logprobs must be an integer, got 1\.5"):
        SamplingParams(**given)


@pytest.fixture
def default_ctrl_c() -> Iterator[None]:
    """As in a terminal; a process started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_ctrl_c")
def test_ctrl_c_leaves_an_engine_that_serves(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = llm._engine.executor.collect

    def interrupted(handle: Any) -> Any:
        signal.raise_signal(signal.SIGINT)  # arrives in the main thread
        return collect(handle)

    with monkeypatch.context() as patch:
        patch.setattr(llm._engine.executor, "collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("hi", GREEDY, use_tqdm=False)
    assert llm.generate("hi", GREEDY, use_tqdm=False)[0].finished
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


PENALTIES: dict[str, Any] = dict(
    presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.2, logit_bias={65: 2.0}
)
KINDS: dict[str, SamplingParams | None] = {
    "greedy": SamplingParams(temperature=0, max_tokens=12),
    "sampled": SamplingParams(temperature=1, top_p=0.9, top_k=40, seed=3, max_tokens=12),
    "logprobs": SamplingParams(temperature=0, logprobs=1, max_tokens=12),
    "prompt_logprobs": SamplingParams(temperature=0, prompt_logprobs=2, max_tokens=6),
    "grammar": SamplingParams(seed=4, grammar=Grammar("regex", "[a-f]{5,9}"), max_tokens=12),
    "penalties": SamplingParams(seed=5, max_tokens=12, **PENALTIES),
    "bad words": SamplingParams(seed=6, bad_words=("a", "bc"), max_tokens=12),
    "scores": SamplingParams(temperature=0, prompt_logprobs=0, max_tokens=1),
    "embedding": None,
}


class Answers:
    """Whatever these kinds of requests bring, in one call where that can be, to be compared."""

    def __init__(self, llm: LLM, kinds: Iterable[str], n: int = 2) -> None:
        wanted = {kind: params for kind in kinds if (params := KINDS[kind]) is not None}
        self.texts: list[Any] = []
        self.vector = np.zeros(0)
        if wanted:
            results = llm.generate(list(wanted), list(wanted.values()), n=n, use_tqdm=False)
            for result in results:
                likely = [at and sorted(at) for at in result.prompt_logprobs or ()]
                self.texts += [likely, [(out.text, out.token_ids) for out in result.outputs]]
        if "embedding" in kinds:
            self.vector = llm.embed("embedding", use_tqdm=False)[0].outputs.embedding

    def check(self, others: "Answers") -> None:
        assert self.texts == others.texts
        np.testing.assert_allclose(self.vector, others.vector, atol=1e-5)


@pytest.mark.slow
def test_interrupts_at_two_hundred_moments(llm: LLM) -> None:
    """By a signal's handler: what is raised arrives at any bytecode, and not in Ctrl-C's place."""
    rng = random.Random(0)
    expected = Answers(llm, KINDS)
    began = time.perf_counter()
    Answers(llm, KINDS)
    length = time.perf_counter() - began
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    num_cut = 0
    try:
        while num_cut < 200:
            kinds = rng.sample(list(KINDS), rng.randint(1, len(KINDS)))
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, length / 8))
                Answers(llm, kinds, n=rng.randint(1, 2))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                num_cut += 1
                load = llm.load()
                assert (load.num_running, load.num_waiting, load.num_used_pages) == (0, 0, 0)
            if num_cut % 20 == 10:
                Answers(llm, KINDS).check(expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    Answers(llm, KINDS).check(expected)


def test_threads_share_it(llm: LLM) -> None:
    """Eight threads get what each gets alone, while a ninth is interrupted again and again."""
    kinds = [kind for kind in KINDS if kind != "scores"]
    expected = [Answers(llm, [kind]) for kind in kinds]
    found: dict[int, Answers] = {}
    is_over = threading.Event()

    def ask(index: int) -> None:
        found[index] = Answers(llm, [kinds[index]])

    def be_interrupted() -> None:
        with contextlib.suppress(TimeoutError):  # between two calls
            while not is_over.is_set():
                with contextlib.suppress(TimeoutError):
                    Answers(llm, kinds)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    victim = threading.Thread(target=be_interrupted)
    for thread in (victim, *threads):
        thread.start()
    for thread in threads:
        while thread.is_alive():
            raise_in(victim, TimeoutError)
            thread.join(0.02)
    is_over.set()
    victim.join()
    for index, alone in enumerate(expected):
        found[index].check(alone)


def raise_in(thread: threading.Thread, error: type[BaseException]) -> None:
    """Raise in another thread, as libraries for timeouts do."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(error)
    )


def test_calls_that_do_not_say_sample_as_the_model_advises(monkeypatch) -> None:
    advised = {"temperature": 0.25, "top_k": 3, "max_tokens": 5}
    engine = fake_sync_engine(default_sampling_params=advised)
    monkeypatch.setattr("jaxserve.llm.build_sync_engine", lambda _: engine)
    llm = LLM("fake")
    assert llm.get_default_sampling_params() == SamplingParams(**advised)
    [result] = llm.generate("a", use_tqdm=False)
    assert len(result.outputs[0].token_ids) == 5
    assert list(llm.stream("a"))[-1].num_output_tokens == 5
