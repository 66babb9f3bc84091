"""The prompt set: different, mixed, the same for the same seed."""

import collections

import pytest

from jaxserve.bench.prompts import KINDS, make_prompts
from jaxserve.core.errors import ConfigError


def test_prompts_differ_and_all_kinds_are_there() -> None:
    prompts = make_prompts(400, seed=1)
    texts = [prompt.messages[0]["content"] for prompt in prompts]
    assert len(set(texts)) == len(texts) == 400
    assert all(text == text.strip() and "{" not in text for text in texts)
    assert all(m["role"] == "user" for prompt in prompts for m in prompt.messages)
    counts = collections.Counter(prompt.kind for prompt in prompts)
    assert set(counts) == set(KINDS)
    assert max(counts.values()) < 2.5 * min(counts.values())
    assert len({prompt.kind for prompt in prompts[:20]}) > 5  # mixed


def test_the_seed_decides() -> None:
    assert make_prompts(30, seed=3) == make_prompts(30, seed=3) != make_prompts(30, seed=4)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        make_prompts(0)


def test_there_are_enough_for_a_benchmark() -> None:
    assert len(make_prompts(1500)) == 1500
