"""Fields that are flags: their values are held against choices and ranges."""

import dataclasses
import math
import re
import typing
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.bench import settings as specs
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.options import NOT_NEGATIVE, POSITIVE, check_options, option, option_types


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    share: float = option(0.5, "a share", range="(0, 1]")
    count: int | None = option(None, "a count", range=POSITIVE)
    spare: int = option(0, "spare ones", range=NOT_NEGATIVE)
    sizes: tuple[int, ...] = option((1, 2), "sizes", range=POSITIVE)
    kinds: tuple[str, ...] = option(("a",), "kinds", choices=("a", "b"))
    rate: float = option(1.0, "a rate", range=POSITIVE)
    free: float = option(-5.0, "any number")
    quiet: bool = option(False, "say nothing", range=POSITIVE)
    seed: int = -1

    def __post_init__(self) -> None:
        check_options(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(share=0), r"share must be in \(0, 1\], got 0"),
        (dict(share=1.01), r"share must be in \(0, 1\]"),
        (dict(count=0), "count must be positive, got 0"),
        (dict(count=-math.inf), "count must be an integer, got -inf"),
        (dict(count=True), "count must be an integer, got True"),
        (dict(count=2**31), "count must be at most 2147483647, got 2147483648"),
        (dict(count=10**5000), "count must be at most 2147483647, got a number"),
        (dict(rate=math.inf), "rate must be finite, got inf"),
        (dict(rate=math.nan), "rate must be a number, got nan"),
        (dict(rate="3"), "rate must be a number, got '3'"),
        (dict(rate=None), "rate must be a number, got None"),
        (dict(share=10**400), "share must be a number, got 1000"),
        (dict(quiet=1), "quiet must be true or false, got 1"),
        (dict(spare=-1), "spare must not be negative, got -1"),
        (dict(sizes=(4, 0)), "sizes must be positive, got 0"),
        (dict(sizes=()), "sizes must not be empty"),
        (dict(kinds=("a", "c")), "kinds must be one of a, b, got c"),
        (dict(free=math.nan), "free must be a number, got nan"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**values)


def test_what_is_in_range_is_taken() -> None:
    Settings(share=1, count=1, spare=0, sizes=(3,), kinds=("b", "a"), free=math.inf)


def test_numbers_of_numpy_become_pythons() -> None:
    given: dict[str, Any] = {"count": np.int64(3), "rate": np.float32(0.5), "sizes": [np.int8(2)]}
    settings = Settings(**given)
    assert (settings.count, settings.rate, settings.sizes) == (3, 0.5, (2,))
    assert [type(settings.count), type(settings.rate), type(settings.sizes[0])] == [int, float, int]


NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([10**30, 10**5000, -(10**400), "1e400", None, 1j])
)
WITH_OPTIONS: list[type] = [EngineConfig, *(
    kind for kind in vars(specs).values()
    if isinstance(kind, type) and issubclass(kind, specs.Spec) and kind is not specs.Spec
)]  # fmt: skip
NUMERIC = [
    (settings, name)
    for settings in WITH_OPTIONS
    for name, (kind, _) in option_types(settings).items()
    if kind in (int, float, tuple[int, ...], tuple[float, ...])
    and settings.__dataclass_fields__[name].metadata
]


@given(st.sampled_from(NUMERIC), NUMBERS)
def test_every_number_is_usable_or_refused_by_name(option: tuple[type, str], value: Any) -> None:
    settings, name = option
    try:
        (kind, _) = option_types(settings)[name]
        given = (value,) if typing.get_origin(kind) is tuple else value
        found = getattr(settings(**{name: given}), name)
    except ConfigError as error:
        assert re.search(rf"\b{name}\b|--trace|budget|at least|needs", str(error))
        return
    for number in found if isinstance(found, tuple) else (found,):
        if number is not None:
            assert number == pytest.approx(value)
            assert abs(number) <= 2**32 if isinstance(number, int) else not math.isnan(number)
            assert number != math.inf or name in ("request_rate", "starvation_timeout")
