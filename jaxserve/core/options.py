"""Dataclass fields that are command-line flags, too: help, choices and range stand once."""

import dataclasses
from typing import Any

from jaxserve.core.errors import ConfigError

POSITIVE, NOT_NEGATIVE, ANY = "(0, inf]", "[0, inf]", "[-inf, inf]"
_IN_WORDS = {POSITIVE: "be positive", NOT_NEGATIVE: "not be negative", ANY: "be a number"}


def option(
    default: Any,
    help: str,
    *,
    group: str | None = None,
    choices: tuple[str, ...] = (),
    range: str = ANY,
    flag: str | None = None,
) -> Any:
    """A dataclass field that is also a command-line flag.

    Args:
        default: its value where none is given.
        help: the flag's line in `--help`.
        group: the heading that it stands under there; None for the command's own.
        choices: what a text, or each one of several, may be; none for anything.
        range: of a number, or of each one of several, as an interval: `"(0, 1]"`.
        flag: how it is given; default `--` and the field's name.
    """
    metadata = {"help": help, "group": group, "choices": choices, "range": range, "flag": flag}
    return dataclasses.field(default=default, metadata=metadata)


def check_options(settings: Any) -> None:
    """Hold every field made by `option` against its choices and its range.

    Raises:
        ConfigError: a value is none of them, or a field of several values has none.
    """
    for field in dataclasses.fields(settings):
        if not field.metadata:
            continue
        value = getattr(settings, field.name)
        if value == ():
            raise ConfigError(f"{field.name} must not be empty")
        choices, interval = field.metadata["choices"], field.metadata["range"]
        for each in value if isinstance(value, tuple) else (value,):
            if each is None:
                continue
            if choices and each not in choices:
                raise ConfigError(f"{field.name} must be one of {', '.join(choices)}, got {each}")
            is_number = isinstance(each, int | float) and not isinstance(each, bool)
            if is_number and not _within(each, interval):
                words = _IN_WORDS.get(interval, f"be in {interval}")
                raise ConfigError(f"{field.name} must {words}, got {each}")


def _within(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    return above and (value < high if interval[-1] == ")" else value <= high)
