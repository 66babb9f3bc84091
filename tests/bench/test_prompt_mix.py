import pytest

from jaxserve.bench import prompt_mix
from jaxserve.bench.prompt_mix import LONG_KINDS, mix_prompts
from jaxserve.bench.prompts import KINDS, make_prompts
from jaxserve.core.errors import ConfigError


@pytest.mark.parametrize(("count", "share"), [(1, 0.0), (7, 1.0), (300, 0.15), (400, 0.5)])
def test_a_mix_has_its_share_of_long_ones_and_nothing_twice(count: int, share: float) -> None:
    prompts = mix_prompts(count, share, seed=4)
    assert len(prompts) == count == len({str(prompt.messages) for prompt in prompts})
    assert sum(prompt.kind in LONG_KINDS for prompt in prompts) == round(count * share)
    assert prompts == mix_prompts(count, share, seed=4)


def test_long_ones_are_spread_over_the_whole_mix() -> None:
    halves = (lambda p: p[:100], lambda p: p[100:])
    prompts = mix_prompts(200, 0.3)
    assert all(10 < sum(p.kind in LONG_KINDS for p in half(prompts)) < 50 for half in halves)
    assert set(KINDS) > LONG_KINDS


@pytest.mark.parametrize(("count", "share"), [(0, 0.5), (5, -0.1), (5, 1.1)])
def test_impossible_mixes_are_refused(count: int, share: float) -> None:
    with pytest.raises(ConfigError):
        mix_prompts(count, share)


def test_a_mix_that_the_templates_do_not_give_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    few = make_prompts(20, seed=1)
    monkeypatch.setattr(prompt_mix, "make_prompts", lambda count, seed: few)
    with pytest.raises(ConfigError, match="different prompts in that mix, not 30"):
        mix_prompts(30, 0.5)
