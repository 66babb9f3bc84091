"""No token outside of a request's grammar, whatever happens around it."""

import asyncio
import json
import random
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.core.errors import InvalidRequest, RequestFailed
from jaxserve.core.grammar import Grammar
from jaxserve.core.request import FinishReason
from jaxserve.core.sampling_params import SamplingParams, ThinkingBudget
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.ebnf import MAX_EBNF_CHARS
from jaxserve.engine.engine import Engine
from jaxserve.engine.grammars import GrammarCompiler, MaskFiller
from jaxserve.testing.fake_executor import FakeModel
from jaxserve.tokenizers.base import Tokenizer
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer
from tests.engine.harness import Answer, assert_idle, fake_engine, prompts, run

EOS = ByteTokenizer.EOS
VOCAB = 272  # padded
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0}, "on": {"type": "boolean"}},
    "required": ["n", "on"],
    "additionalProperties": False,
}
KINDS = [
    Grammar("json_object"),
    Grammar("json_schema", json.dumps(SCHEMA)),
    Grammar("regex", "(ab|c)+d"),
    Grammar("lark", 'start: "<" /[a-z]+/ ">"'),
    Grammar.choice(["yes", "no", "not yet", 'é\n"/']),
]


def sampled(grammar: Grammar | None, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"grammar": grammar, "max_tokens": 40, "seed": 1, **fields})


def engine(**options: Any) -> Engine:
    model = options.pop("model", FakeModel(vocab_size=VOCAB))
    return fake_engine(model=model, **options)


def assert_follows(answer: Answer, grammar: Grammar, tokenizer: Tokenizer | None = None) -> None:
    """By a new matcher: every token was allowed, and an answer that stopped was complete."""
    matcher = GrammarCompiler(tokenizer or ByteTokenizer(), VOCAB).compile(grammar)
    *body, last = answer.token_ids or [-1]
    if last != EOS and answer.token_ids:
        body.append(last)
    masks = MaskFiller(VOCAB)
    for token in body:
        [state] = masks.fill([matcher])
        assert not isinstance(state, RequestFailed)
        assert state.mask[token // 32] >> (token % 32) & 1, "a token that the grammar forbids"
        matcher.push(token)
    if answer.finish_reason is FinishReason.STOP:
        [state] = masks.fill([matcher])
        assert not isinstance(state, RequestFailed) and state.is_complete
        if grammar.kind == "json_schema":
            jsonschema.validate(json.loads(answer.text), json.loads(grammar.source))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"overlap": False}, {"num_pages": 18}, {"num_pages": 18, "overlap": False},
        {"max_num_batched_tokens": 3},
    ],
    ids=["overlap", "no-overlap", "preemption", "preemption-no-overlap", "small-steps"],
)  # fmt: skip
def test_every_answer_is_of_its_grammar(options: dict[str, Any]):
    requests = [
        (p, sampled(KINDS[i % 5] if i % 6 else None, seed=i)) for i, p in enumerate(prompts(48, 14))
    ]
    under = engine(**options)
    answers = run(under, requests)
    for (_, params), answer in zip(requests, answers, strict=True):
        if params.grammar is not None:
            assert_follows(answer, params.grammar)
    ended = [a for a, (_, p) in zip(answers, requests, strict=True) if p.grammar]
    assert sum(a.finish_reason is FinishReason.STOP for a in ended) > 15
    assert any(a.finish_reason is FinishReason.LENGTH for a in ended)
    if "num_pages" in options:
        assert under.load().num_preemptions > 0


def test_aborts_beside_grammars():
    """Requests that vanish at any moment leave the others' grammars alone."""
    random_ = random.Random(3)
    under = engine(num_pages=24)
    answers = {f"r{i}": Answer() for i in range(40)}
    for i, (name, prompt) in enumerate(zip(answers, prompts(40, 12), strict=True)):
        under.add(name, prompt, sampled(KINDS[i % 5], seed=i))
    while under.has_work:
        for delta in under.step(0.0):
            answers[delta.request_id].take(delta)
        if random_.random() < 0.2:
            victim = random_.choice(list(answers))
            if (delta := under.abort(victim)) is not None:
                answers[victim].take(delta)
        under._scheduler.check()
    assert_idle(under)
    for i, answer in enumerate(answers.values()):
        assert_follows(answer, KINDS[i % 5])
    reasons = {answer.finish_reason for answer in answers.values()}
    assert reasons >= {FinishReason.STOP, FinishReason.ABORT}


@pytest.mark.parametrize("overlap", [True, False])
def test_a_complete_grammar_ends_the_answer(overlap: bool):
    [answer] = run(engine(overlap=overlap), [([1], sampled(Grammar.choice(["only this"])))])
    assert answer.text == "only this" and answer.finish_reason is FinishReason.STOP
    assert answer.token_ids == [*b"only this", EOS]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 30}])
def test_a_complete_grammar_ends_the_answer_without_eos(overlap: bool, fields: dict[str, Any]):
    """Whether nothing can end it or nothing may yet: it cannot go on, so it is over."""
    under = engine(overlap=overlap)
    [answer] = run(under, [([1], sampled(Grammar.choice(["only this"]), **fields))])
    assert answer.token_ids == [*b"only this"] and answer.finish_reason is FinishReason.STOP
    assert under.load().num_finished == 1


def test_a_stop_token_may_end_a_complete_grammar():
    params = sampled(Grammar("regex", "a+"), stop_token_ids=(7,), ignore_eos=True)
    answers = run(engine(), [([i], params) for i in range(9)])
    assert {a.token_ids[-1] for a in answers} == {7}
    assert all(set(a.token_ids[:-1]) == {97} for a in answers)


def test_a_grammar_and_other_rules_hold_together():
    params = sampled(
        Grammar("regex", "[a-z]+"), bad_words=("e",), allowed_token_ids=(*range(97, 110), EOS),
        min_tokens=5, max_tokens=12,
    )  # fmt: skip
    answers = run(engine(), [([i], params) for i in range(12)])
    for answer in answers:
        assert set(answer.text) <= set("abcdfghijklm") and len(answer.text) >= 5


def test_rules_that_exclude_each_other_end_the_request():
    under = engine()
    under.add("r", [1], sampled(Grammar("regex", "ab+"), allowed_token_ids=(97,)))
    deltas = [delta for _ in range(9) for delta in under.step(0.0)]
    assert [d.token_ids for d in deltas] == [(97,), ()]
    assert deltas[-1].finish_reason is FinishReason.ERROR
    assert isinstance(deltas[-1].error, RequestFailed)
    assert_idle(under)


@settings(max_examples=30)
@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=5), st.integers(0, 999))
def test_any_choice_can_be_made(options: list[str], seed: int):
    options = [o for o in options if o.encode("utf-8", "ignore").decode() == o] or ["x"]
    [answer] = run(engine(), [([1], sampled(Grammar.choice(options), seed=seed))])
    assert answer.text in options


def test_a_choice_may_be_large_and_nested():
    options = ["a" * i for i in range(1, 30)] + [f"option {i}" for i in range(8000)]
    answers = run(engine(), [([i], sampled(Grammar.choice(options), seed=i)) for i in range(20)])
    assert all(a.text in options and a.finish_reason is FinishReason.STOP for a in answers)
    assert len({len(a.text) for a in answers}) > 1  # one that another begins with can be chosen


def test_a_grammar_that_becomes_too_complex_ends_its_request_alone():
    """Refused by llguidance's own limits, in the middle of an answer."""
    lark = "start: " + " | ".join(f"a{i}" for i in range(3000))
    lark += "".join(f'\na{i}: /[a-z]{{1,{i % 60 + 1}}}/ "x{i}"' for i in range(3000))
    under = engine()
    under.add("r", [1], sampled(Grammar("lark", lark)))
    under.add("fine", [1, 2], sampled(None, max_tokens=9, ignore_eos=True))
    deltas = [delta for _ in range(14) for delta in under.step(0.0)]
    [last] = [d for d in deltas if d.request_id == "r" and d.finish_reason is not None]
    assert isinstance(last.error, RequestFailed) and "max is 2000" in str(last.error)
    assert len(str(last.error)) < 700
    assert sum(len(d.token_ids) for d in deltas if d.request_id == "fine") == 9
    assert_idle(under)


# Thinking before it.

THINKING = ThinkingBudget(4, start_ids=(256,), end_ids=(2, 3))


@pytest.mark.parametrize("inside", [True, False])
def test_thinking_comes_before_the_grammar(inside: bool):
    budget = ThinkingBudget(4, (256,), (2, 3), begins_inside=inside)
    grammar = Grammar("regex", "[ab]{3}")
    answers = run(
        engine(model=FakeModel(vocab_size=VOCAB, eos_token_id=EOS, eos_probability=0.3)),
        [([i], sampled(grammar, thinking=budget)) for i in range(60)],
    )
    num_thinking = 0
    for answer in answers:
        ids = answer.token_ids
        if inside or ids[0] == 256:
            num_thinking += 1
            end = next(i for i in range(len(ids)) if ids[i : i + 2] == [2, 3])
            assert end - (not inside) <= 4 and EOS not in ids[:end]
            ids = ids[end + 2 :]
        assert len(ids) == 4 and set(ids[:3]) <= {97, 98} and ids[3] == EOS
    assert num_thinking == 60 if inside else 0 < num_thinking < 60


# Over asyncio, where grammars are compiled on other threads.


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("json_schema", "{"), "not valid JSON"),
        (Grammar("json_schema", "[]"), "a JSON schema is a JSON object"),
        (Grammar("json_schema", '{"uniqueItems": true}', is_strict=True), "uniqueItems"),
        (Grammar("json_schema", '{"$ref": "https://example.com/x"}'), "example.com"),
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("lark", "start: nobody"), "nobody"),
        (Grammar("lark", "start: start"), "no text fits it"),
        (Grammar("lark", "start: " + "(" * 9000 + '"a"' + ")" * 9000), "too deeply nested"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused(grammar: Grammar, message: str):
    async def main() -> None:
        with pytest.raises(InvalidRequest, match=message) as caught:
            async for _ in under.generate(None, [1], sampled(grammar)):
                pass
        assert caught.value.param == "grammar" and len(str(caught.value)) < 1000

    under = AsyncEngine(engine())
    try:
        asyncio.run(main())
    finally:
        under.shutdown()
    assert_idle(under._engine)


def test_grammars_over_asyncio():
    async def answer(i: int) -> Answer:
        whole = Answer()
        async for delta in under.generate(None, [i, 1], sampled(KINDS[i % 5], seed=i)):
            whole.take(delta)
        return whole

    async def main() -> list[Answer]:
        return await asyncio.gather(*(answer(i) for i in range(40)))

    under = AsyncEngine(engine())
    try:
        answers = asyncio.run(main())
    finally:
        under.shutdown()
    for i, each in enumerate(answers):
        assert_follows(each, KINDS[i % 5])
    assert_idle(under._engine)


def test_a_failing_request_hears_why_over_asyncio():
    async def main() -> None:
        params = sampled(Grammar("regex", "ab+"), allowed_token_ids=(97,))
        with pytest.raises(RequestFailed, match="no token can come next"):
            async for _ in under.generate(None, [1], params):
                pass

    under = AsyncEngine(engine())
    try:
        asyncio.run(main())
        assert under.is_ready
    finally:
        under.shutdown()


# Compiling.


def test_grammars_are_compiled_once(monkeypatch: pytest.MonkeyPatch):
    compiler = GrammarCompiler(ByteTokenizer(), VOCAB)
    made = compiler.compile(KINDS[1])
    monkeypatch.setattr("llguidance.LLMatcher", None)  # nothing can be compiled any more
    other = compiler.compile(Grammar(KINDS[1].kind, KINDS[1].source))
    made.push(ord("{"))
    masks = MaskFiller(VOCAB)
    [first, second] = masks.fill([made, other])
    assert not isinstance(first, RequestFailed) and not isinstance(second, RequestFailed)
    assert first.mask.tolist() != second.mask.tolist()  # each is where its answer is


@pytest.mark.parametrize("vocab_size", [258, 272, 287, 288, 320])
def test_padding_is_never_allowed(vocab_size: int):
    matcher = GrammarCompiler(ByteTokenizer(), vocab_size).compile(Grammar("regex", "(.|\n)*"))
    [state] = MaskFiller(vocab_size).fill([matcher])
    assert not isinstance(state, RequestFailed) and state.is_complete
    allowed = [i for i in range(vocab_size) if state.mask[i // 32] >> (i % 32) & 1]
    assert len(state.mask) == -(-vocab_size // 32)
    assert set(range(128)) <= set(allowed) <= set(range(256))


@pytest.mark.parametrize(
    ("layout", "grammar", "blanks"),
    [
        ("any", Grammar("json_object"), " " * 40),
        ("little", Grammar("json_object"), " "),
        ("little", Grammar("json_object"), "\n" + " " * 24),
        ("little", Grammar("json_schema", '{"type": "object"}'), "\n\t"),
        ("compact", Grammar("json_object"), ""),
        ("any", Grammar("json_object", whitespace=""), ""),
        ("compact", Grammar("json_object", whitespace="[ ]{3}"), "   "),
        ("little", Grammar("lark", f"start: {Grammar('json_object').json_rule()}"), " "),
        ("compact", Grammar("lark", f"start: {Grammar('json_object').json_rule()}"), ""),
    ],
)
def test_blanks_in_json_have_an_end(layout: str, grammar: Grammar, blanks: str):
    compiler = GrammarCompiler(ByteTokenizer(), VOCAB, layout)
    matcher = compiler.compile(grammar)
    for token in f'{{{blanks}"a":{blanks}1'.encode():
        matcher.push(token)
    matcher = compiler.compile(grammar)
    for token in b"{" + blanks.encode():
        matcher.push(token)
    with pytest.raises(RequestFailed, match="cannot be followed"):
        matcher.push(ord("\n"))


def test_a_layout_is_for_json():
    with pytest.raises(InvalidRequest, match="whitespace is for JSON"):
        Grammar("regex", "a", whitespace="")
    with pytest.raises(InvalidRequest, match="cannot be used"):
        GrammarCompiler(ByteTokenizer(), VOCAB).compile(Grammar("json_object", whitespace="("))


@pytest.mark.parametrize(
    ("source", "fits"),
    [
        ('root ::= "yes" | "no"', "no"),
        ('root ::= word ("-" word)*\nword ::= [a-c]{2} # two\n', "ab-ca"),
        ('  root  ::= "\\n" | "\xe9"', "\xe9"),
        ('start: "a ::= b"', "a ::= b"),
        ('start: ("yes" | "no")', "yes"),
    ],
)
def test_ebnf_and_lark_alike(source: str, fits: str):
    tokenizer = ByteTokenizer()
    matcher = GrammarCompiler(tokenizer, tokenizer.vocab_size).compile(Grammar("lark", source))
    for byte in fits.encode():
        matcher.push(byte)
    [state] = MaskFiller(tokenizer.vocab_size).fill([matcher])
    assert not isinstance(state, RequestFailed) and state.is_complete


@pytest.mark.parametrize(
    "source", ["root ::= (", "root ::= " + "(" * 80, 'root ::= "a"'.ljust(MAX_EBNF_CHARS + 1)]
)
def test_ebnf_that_cannot_be_used(source: str):
    with pytest.raises(InvalidRequest, match="grammar"):
        GrammarCompiler(ByteTokenizer(), 258).compile(Grammar("lark", source))
