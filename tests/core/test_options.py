"""Fields that are flags: their values are held against choices and ranges."""

import dataclasses
import math
from typing import Any

import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.core.options import NOT_NEGATIVE, POSITIVE, check_options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    share: float = option(0.5, "a share", range="(0, 1]")
    count: int | None = option(None, "a count", range=POSITIVE)
    spare: int = option(0, "spare ones", range=NOT_NEGATIVE)
    sizes: tuple[int, ...] = option((1, 2), "sizes", range=POSITIVE)
    kinds: tuple[str, ...] = option(("a",), "kinds", choices=("a", "b"))
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
        (dict(count=-math.inf), "count must be positive"),
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
