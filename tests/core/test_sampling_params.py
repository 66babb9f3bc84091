"""Every bad sampling parameter is refused by name; every good one is kept."""

import math
from typing import Any

import pytest

from jaxserve.core.errors import InvalidRequest, JaxserveError
from jaxserve.core.sampling_params import MAX_SEED, MAX_STOP_STRINGS, SamplingParams

BAD: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", 100.5),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_k", -2),
    ("top_k", 2**31),
    ("top_p", -0.1),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("min_p", -0.01),
    ("min_p", 1.5),
    ("min_p", math.inf),
    ("seed", -1),
    ("seed", MAX_SEED + 1),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("stop", ("x",) * (MAX_STOP_STRINGS + 1)),
    ("stop", ("",)),
    ("stop", ""),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", (3, 2**31)),
]
GOOD: list[tuple[str, Any]] = [
    ("temperature", 0.0),
    ("temperature", 100.0),
    ("top_k", -1),
    ("top_k", 2**31 - 1),
    ("top_p", 1e-6),
    ("min_p", 1.0),
    ("seed", MAX_SEED),
    ("max_tokens", None),
    ("max_tokens", 1),
    ("stop", ("x",) * MAX_STOP_STRINGS),
    ("stop_token_ids", (0, 2**31 - 1)),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match="stop" if "stop" in field else field) as caught:
        SamplingParams(**{field: value})
    assert isinstance(caught.value, JaxserveError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("field", "value"), GOOD)
def test_limits_are_allowed(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value


def test_one_stop_string_and_lists_become_tuples() -> None:
    word: Any = "end"
    words: Any = ["a", "b"]
    ids: Any = [1, 2]
    assert SamplingParams(stop=word).stop == ("end",)
    assert SamplingParams(stop=words).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=ids) == SamplingParams(stop_token_ids=(1, 2))


def test_greedy_is_temperature_zero() -> None:
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=1e-3).greedy
