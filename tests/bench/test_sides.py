import pytest

from jaxserve.bench.prefix_cache import SharedSpec
from jaxserve.bench.sides import count_differing, identity, in_turns
from jaxserve.bench.stepping import SteppedRecord
from jaxserve.core.errors import ConfigError


def answers(*token_ids: list[int]) -> list[SteppedRecord]:
    return [SteppedRecord(request_id="x", prompt_len=1, token_ids=ids) for ids in token_ids]


def test_every_other_round_goes_backwards() -> None:
    assert [in_turns("abc", i) for i in range(3)] == [list("abc"), list("cba"), list("abc")]


def test_differing_answers_are_counted_and_named() -> None:
    assert count_differing(answers([1, 2], [3]), answers([1, 2], [4])) == 1
    with pytest.raises(ValueError):
        count_differing(answers([1]), [])
    assert identity(0, 5) == "all 5 answers identical"
    assert identity(2, 5) == "2 of 5 answers DIFFER"


def test_numbers_must_be_positive_but_for_the_seed() -> None:
    assert SharedSpec(seed=0).seed == 0
    for field in ("num_requests", "request_rate", "rounds"):
        with pytest.raises(ConfigError, match=field):
            SharedSpec(**{field: 0})
