"""Dataclass fields that are command-line flags, too: help, choices and range stand once."""

import dataclasses
import functools
import os
import types
import typing
from collections.abc import Callable
from typing import Any

from jaxserve.core.errors import ConfigError, InvalidRequest
from jaxserve.core.plain_values import boolean, integer, number, shown, string

POSITIVE, NOT_NEGATIVE, ANY = "(0, inf)", "[0, inf)", "[-inf, inf]"
AT_LEAST_ONE = "[1, inf)"
NO_LIMIT = "(0, inf]"  # positive, or none at all
GIB = "[0, 1048576]"  # GiB of memory or disk, up to a pebibyte
MILLISECONDS = "(0, 1000000000]"
SEED = "[0, 4294967295]"
MAX_INTEGER = 2**31 - 1  # of those whose range has no end: what devices count with
_BELOW = {"(0": "be positive", "[0": "not be negative", "[1": "be at least 1"}


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
    """Hold every field made by `option` against its type, its choices and its range.

    NumPy's numbers become Python's; integers are no larger than `MAX_INTEGER`, unless a range says.

    Raises:
        ConfigError: a value is of another type or none of them, or a field of several values has
            none; the message begins with the field's name.
    """
    types_by_name = option_types(type(settings))
    for field in dataclasses.fields(settings):
        kind, is_optional = types_by_name[field.name]
        value = getattr(settings, field.name)
        if not field.metadata or (value is None and is_optional):
            continue
        if isinstance(value, tuple) and not value:
            raise ConfigError(f"{field.name} must not be empty")
        if typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
            if not isinstance(value, list | tuple):
                raise ConfigError(f"{field.name} must be several values, got {value!r}")
            plain: Any = tuple(_checked(field, kind, each) for each in value)
        else:
            plain = _checked(field, kind, value)
        object.__setattr__(settings, field.name, plain)  # most are frozen


def check_number(name: str, value: float, interval: str) -> None:
    """Hold a number against an interval, such as `"(0, 1]"`.

    Raises:
        ConfigError: it is not in there, or an integer above `MAX_INTEGER` where that is endless.
    """
    is_endless = interval[:-1].endswith("inf")
    is_too_large = is_endless and isinstance(value, int) and value > MAX_INTEGER
    if _within(value, interval) and not is_too_large:
        return
    if value != value:
        wanted = "be a number"
    elif is_too_large:
        wanted = f"be at most {MAX_INTEGER}"
    elif is_endless and value > 0:
        wanted = "be finite"
    else:
        wanted = _BELOW.get(interval[:2], "") if is_endless else f"be in {interval}"
    raise ConfigError(f"{name} must {wanted}, got {shown(value)}")


def _within(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    return above and (value < high if interval[-1] == ")" else value <= high)


class OptionType(typing.NamedTuple):
    """A field's type without `| None`, and whether it may be None."""

    kind: Any
    is_optional: bool


@functools.cache
def option_types(settings: type) -> dict[str, OptionType]:
    """The types of a dataclass's fields by name."""
    result = {}
    for name, hint in typing.get_type_hints(settings).items():
        is_optional = isinstance(hint, types.UnionType)
        if is_optional:
            (hint,) = (arm for arm in typing.get_args(hint) if arm is not types.NoneType)
        result[name] = OptionType(hint, is_optional)
    return result


_PLAIN: dict[type, Callable[[str, Any], Any]] = {
    int: integer, float: number, bool: boolean, str: string
}  # fmt: skip


def _checked(field: dataclasses.Field, kind: Any, value: Any) -> Any:
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    plain = _PLAIN.get(kind)
    if plain is not None:
        try:
            value = plain(field.name, value)
        except InvalidRequest as error:
            raise ConfigError(str(error)) from None
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"{field.name} must be one of {', '.join(choices)}, got {value}")
    if kind in (int, float):
        check_number(field.name, value, field.metadata["range"])
    return value
