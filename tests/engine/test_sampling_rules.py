"""Which tokens a request's rules let come next, and that the engine samples no others."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.errors import InvalidRequest, RequestFailed
from jaxserve.core.request import FinishReason
from jaxserve.core.sampling_params import SamplingParams, ThinkingBudget
from jaxserve.engine.bad_words import banned_next, spellings
from jaxserve.engine.engine import Engine
from jaxserve.engine.sampling_rules import RuleMaker, SamplingRules
from jaxserve.engine.tail_matcher import TailMatcher
from jaxserve.engine.thinking import ThinkingMeter
from jaxserve.engine.token_masks import all_tokens, mask_of
from jaxserve.testing.fake_executor import FakeModel
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer
from tests.engine.harness import Answer, assert_idle, fake_engine, greedy, prompts, run, tokens

EOS = ByteTokenizer.EOS
VOCAB = 272  # padded
MODEL = FakeModel(vocab_size=VOCAB, eos_token_id=EOS, eos_probability=0.1)


def members(mask: np.ndarray) -> list[int]:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def rules(**fields: Any) -> SamplingRules:
    made = RuleMaker(ByteTokenizer(), VOCAB, (EOS,)).make(SamplingParams(**fields))
    assert made is not None
    return made


def engine(**options: Any) -> Engine:
    return fake_engine(**{"model": MODEL, **options})


def answer_to(params: SamplingParams, prompt: list[int] | None = None, **options: Any) -> Answer:
    [answer] = run(engine(**options), [(prompt or [1, 2, 3], params)])
    return answer


# Masks and matchers.


@given(st.sets(st.integers(0, 99)), st.integers(1, 100))
def test_a_mask_holds_its_tokens_and_no_others(ids: set[int], vocab_size: int):
    mask = mask_of(ids, vocab_size)
    assert mask.dtype == np.uint32 and mask.shape == (-(-vocab_size // 32),)
    assert members(mask) == sorted(i for i in ids if i < vocab_size)
    assert members(all_tokens(vocab_size)) == list(range(vocab_size))


@given(st.lists(st.integers(0, 1), min_size=1, max_size=4), st.lists(st.integers(0, 1)))
def test_a_tail_matcher_is_a_search(pattern: list[int], items: list[int]):
    matcher = TailMatcher(pattern)
    for end in range(1, len(items) + 1):
        so_far = items[:end]
        assert matcher.step(items[end - 1]) == (so_far[-len(pattern) :] == pattern)
        tails = [n for n in range(len(pattern)) if so_far[len(so_far) - n :] == pattern[:n]]
        assert matcher.matched == max(tails)


# Thinking.


@given(
    st.integers(0, 4),
    st.sampled_from([(7,), (7, 8), (7, 7)]),
    st.booleans(),
    st.lists(st.integers(5, 9), max_size=40),
)
def test_no_thinking_is_longer_than_its_budget(
    most: int, end: tuple[int, ...], inside: bool, wanted: list[int]
):
    """Whatever the model wants to say, thoughts over all blocks stay within the budget."""
    start = (5, 6)
    meter = ThinkingMeter(ThinkingBudget(most, start, end, begins_inside=inside))
    said: list[int] = []
    for token in wanted:
        said.append(token if meter.forced is None else meter.forced)
        meter.push(said[-1])
    assert _thought(said, start, end, inside) <= most


def _thought(said: list[int], start: tuple[int, ...], end: tuple[int, ...], inside: bool) -> int:
    """Tokens between markers by looking at the whole; an unfinished marker counts for nothing."""
    total, begin = 0, 0
    for i in range(1, len(said) + 1):
        marker = end if inside else start
        if i - begin >= len(marker) and tuple(said[i - len(marker) : i]) == marker:
            total += i - len(marker) - begin if inside else 0
            begin, inside = i, not inside
    if not inside:
        return total
    rest = said[begin:]
    partial = max(n for n in range(len(end)) if tuple(rest[len(rest) - n :]) == end[:n])
    return total + len(rest) - partial


TEXTS = {1: b"<", 2: b"/", 3: b">", 4: b" <", 5: b"/>", 6: b">\n", 7: b">x", 8: b"hm"}


@pytest.mark.parametrize(
    ("tokens", "is_over", "overshoot"),
    [
        ([8, 1, 2, 3], True, b""), ([8, 4, 2, 3], True, b""), ([8, 4, 5], True, b""),
        ([1, 2, 6], True, b"\n"), ([1, 2, 7], True, b"x"), ([1, 8, 2, 3], False, b""),
        ([1, 1, 5], True, b""), ([1, 2], False, b""),
    ],
)  # fmt: skip
def test_thinking_ends_however_its_marker_is_cut(
    tokens: list[int], is_over: bool, overshoot: bytes
):
    budget = ThinkingBudget(9, (8, 8), (1, 2, 3), begins_inside=True)
    meter = ThinkingMeter(budget, TEXTS.__getitem__)
    for token in tokens:
        meter.push(token)
    assert (meter.is_inside, meter.overshoot) == (not is_over, overshoot)


def test_a_used_up_budget_ends_thinking_after_half_a_marker():
    meter = ThinkingMeter(ThinkingBudget(2, (8,), (1, 2, 3), begins_inside=True), TEXTS.__getitem__)
    meter.push(8)
    meter.push(4)  # looks like the marker's beginning, and is none of its tokens
    for token in (1, 2, 3):
        assert meter.forced == token
        meter.push(token)
    assert not meter.is_inside


def test_the_engine_ends_thinking_in_time():
    budget = ThinkingBudget(3, start_ids=(300,), end_ids=(66, 67), begins_inside=True)
    answer = answer_to(greedy(12, thinking=budget))
    assert answer.token_ids[3:5] == [66, 67]
    assert len(answer.token_ids) == 12


# Bad words.


def test_bad_words_are_spelt_with_and_without_a_space():
    assert spellings(["ab", "ab", " c"], ByteTokenizer()) == [
        (97, 98), (32, 97, 98), (99,), (32, 99),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "banned"),
    [([], [5]), ([1], [5, 2]), ([1, 2], [5, 3]), ([9, 1, 2], [5, 3]), ([2, 1], [5, 2])],
)
def test_the_last_token_of_a_bad_word_is_banned(answer: list[int], banned: list[int]):
    assert banned_next([(5,), (1, 2), (1, 2, 3)], answer) == banned


@pytest.mark.parametrize("overlap", [True, False])
def test_no_answer_has_a_bad_word(overlap: bool):
    words = (*map(chr, range(60, 100)), "no", "zz")
    params = greedy(50, bad_words=words, allowed_token_ids=tuple(range(32, 123)))
    answers = run(engine(overlap=overlap, num_pages=300), [(p, params) for p in prompts(12, 9)])
    text = "".join(answer.text for answer in answers)
    assert len(text) == 12 * 50
    assert not any(word in text for word in words)
    assert len(set(text)) > 20


# Allowed tokens and the least length.


def test_only_allowed_tokens_are_sampled():
    allowed = (5, 40, 200, VOCAB - 1)
    answers = run(engine(), [(p, greedy(20, allowed_token_ids=allowed)) for p in prompts(9, 9)])
    assert {token for answer in answers for token in answer.token_ids} == set(allowed)


@pytest.mark.parametrize("overlap", [True, False])
def test_no_eos_before_min_tokens(overlap: bool):
    params = dataclasses.replace(greedy(40), ignore_eos=False)
    free = run(engine(overlap=overlap), [(p, params) for p in prompts(30, 9)])
    assert min(len(a.token_ids) for a in free) < 7
    params = dataclasses.replace(params, min_tokens=7, stop_token_ids=tuple(range(50)))
    held = run(engine(overlap=overlap), [(p, params) for p in prompts(30, 9)])
    assert min(len(a.token_ids) for a in held) == 8  # the one that ends it comes after so many
    assert all(not {EOS, *range(50)} & set(a.token_ids[:7]) for a in held)
    assert {a.finish_reason for a in held} == {FinishReason.STOP}


def test_rules_allow_what_they_say():
    made = rules(min_tokens=1, allowed_token_ids=(3, EOS), bad_words=("\x04",))
    first = made.allowed([])
    assert first.mask is not None and members(first.mask) == [3]
    made.follow([3])
    second = made.allowed([3])
    assert second.mask is not None and members(second.mask) == [3, EOS]


def test_rules_that_say_nothing_now_cost_no_mask():
    assert rules(min_tokens=1).allowed([9]).mask is None
    assert RuleMaker(ByteTokenizer(), VOCAB, (EOS,)).make(SamplingParams(logprobs=3)) is None


def test_a_request_that_may_say_nothing_ends_alone():
    """Its caller hears why; the others go on."""
    under = engine()
    under.add("stuck", [1], SamplingParams(min_tokens=3, allowed_token_ids=(EOS,)))
    under.add("fine", [1, 2], greedy(10))
    deltas = []
    while under.has_work:
        deltas += under.step(0.0)
        under._scheduler.check()
    [stuck] = [d for d in deltas if d.request_id == "stuck"]
    assert stuck.finish_reason is FinishReason.ERROR and not stuck.token_ids
    assert isinstance(stuck.error, RequestFailed) and "no token can come next" in str(stuck.error)
    assert sum(len(d.token_ids) for d in deltas if d.request_id == "fine") == 10
    assert_idle(under)


def test_rules_that_break_end_their_request_alone(monkeypatch: pytest.MonkeyPatch):
    def broken(self: SamplingRules, answer: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(SamplingRules, "follow", broken)
    under = engine()
    under.add("broken", [1], greedy(9, min_tokens=3))
    under.add("fine", [1, 2], greedy(9))
    deltas = [d for _ in range(15) for d in under.step(0.0)]
    [broken_delta] = [d for d in deltas if d.request_id == "broken"]
    assert isinstance(broken_delta.error, RequestFailed)
    assert sum(len(d.token_ids) for d in deltas if d.request_id == "fine") == 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"allowed_token_ids": (1, VOCAB)}, f"allowed_token_ids has token {VOCAB}"),
        ({"logit_bias": {VOCAB + 5: 1.0}}, f"logit_bias has token {VOCAB + 5}"),
    ],
)
def test_tokens_outside_of_the_vocabulary_are_refused(fields: dict[str, Any], message: str):
    under = engine()
    with pytest.raises(InvalidRequest, match=message) as caught:
        under.add("r", [1], SamplingParams(**fields))
    assert caught.value.param == next(iter(fields))
    assert not under.has_work


# Whatever the schedule.


@pytest.mark.parametrize(
    "options", [{"num_pages": 18}, {"overlap": False}, {"num_pages": 18, "max_num_seqs": 3}]
)
def test_the_schedule_changes_no_token(options: dict[str, Any]):
    """With preemption, or one by one: the same answers as with room for all."""
    bias = {17: 100.0, 30: -100.0}
    kinds = [
        greedy(20, min_tokens=5), greedy(20, bad_words=("a", "bc")), greedy(20, logit_bias=bias),
        greedy(20, allowed_token_ids=tuple(range(60))), greedy(20), greedy(20, logprobs=2),
        greedy(20, thinking=ThinkingBudget(4, (1,), (2, 3), begins_inside=True)),
    ]  # fmt: skip
    requests = [(p, kinds[i % len(kinds)]) for i, p in enumerate(prompts(21, 14))]
    calm = run(engine(num_pages=400), requests)
    busy_engine = engine(**options)
    assert tokens(run(busy_engine, requests)) == tokens(calm)
    if "num_pages" in options:
        assert busy_engine.load().num_preemptions > 0


def test_penalties_get_the_history():
    under = engine()
    seen: list[tuple[int, int, int]] = []
    sample = under.executor.sample

    def spy(handle: Any, extras: Any) -> None:
        for extra in extras.values():
            seen.append((len(extra.history), extra.num_prompt_tokens, sum(extra.history)))
            assert extra.mask is None
        sample(handle, extras)

    under.executor.sample = spy  # type: ignore[method-assign]
    prompt = list(range(20))
    [answer] = run(under, [(prompt, greedy(6, presence_penalty=1.0))])
    history = [prompt + answer.token_ids[:n] for n in range(6)]
    assert seen == [(len(h), 20, sum(h)) for h in history]
