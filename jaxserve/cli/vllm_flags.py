"""vLLM's names on a command line; see `core.vllm_names`."""

import difflib
from collections.abc import Collection, Iterator, Sequence

import click

from jaxserve.core.vllm_names import AXES, INSTEAD, SAME

_COMMON_WORDS = {"size", "max", "num", "len", "dir", "no", "enable", "disable", "file", "model"}


def translated(arguments: Sequence[str], command: click.Command, ctx: click.Context) -> list[str]:
    """A command's arguments with vLLM's names replaced by ours.

    Args:
        arguments: as they were typed.
        command: which options it has decides what is replaced.
        ctx: for messages.

    Raises:
        UsageError: an option of vLLM's has no equivalent; the message says what to use.
    """
    flags, takes_value = _options_of(command, ctx)
    result: list[str] = []
    axes: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            result += ["--", *rest]
            break
        name, equals, value = argument.partition("=")
        if name in flags or not argument.startswith("-"):
            result.append(argument)
            if name in takes_value and not equals:
                result += _next(rest)  # whatever it looks like
            continue
        name = name.replace("_", "-")
        if name in AXES and "--mesh" in flags:
            axis, size = AXES[name], value if equals else "".join(_next(rest))
            if axes.setdefault(axis, size) != size:
                raise click.UsageError(f"{name} is given twice", ctx)
        elif name == "--model" and "model" in (p.name for p in command.params):
            result += [value] if equals else _next(rest)
        elif name in INSTEAD and _is_engines(flags):
            raise click.UsageError(f"{name} is an option of vLLM's: {INSTEAD[name]}", ctx)
        else:
            ours = name if name in flags else SAME.get(name, "")
            result.append(f"{ours}{equals}{value}" if ours in flags else argument)
            if ours in takes_value and not equals:
                result += _next(rest)
    if axes:
        if any(argument.partition("=")[0] == "--mesh" for argument in result):
            raise click.UsageError("--mesh says already how the model is split", ctx)
        result = ["--mesh", ",".join(f"{axis}={size}" for axis, size in axes.items()), *result]
    return result


def likely_meant(unknown: str, command: click.Command, ctx: click.Context) -> list[str]:
    """The options that an unknown one may stand for: spelled nearly so, or with a telling word.

    Args:
        unknown: what was typed.
        command: whose options it may be.
        ctx: the command's.
    """
    flags = sorted(flag for flag in _options_of(command, ctx)[0] if flag.startswith("--"))
    words = _words(unknown)
    sharing = [flag for flag in flags if words & _words(flag)]
    sharing.sort(key=lambda flag: -len(words & _words(flag)))
    alike = difflib.get_close_matches(unknown, flags, cutoff=0.8)
    if not words:  # common ones only, as in --max-len: those that have them all
        parts = _parts(unknown)
        alike = [flag for flag in flags if parts and parts <= _parts(flag)]
    return list(dict.fromkeys([*alike, *sharing]))[:3]


def _words(flag: str) -> set[str]:
    return _parts(flag) - _COMMON_WORDS


def _parts(flag: str) -> set[str]:
    return set(flag.strip("-").replace("_", "-").split("-"))


def _options_of(command: click.Command, ctx: click.Context) -> tuple[set[str], set[str]]:
    """All flags of a command, and those that take a value."""
    flags: set[str] = set()
    takes_value: set[str] = set()
    for parameter in command.get_params(ctx):
        if isinstance(parameter, click.Option):
            names = {*parameter.opts, *parameter.secondary_opts}
            flags |= names
            if not parameter.is_flag and not parameter.count:
                takes_value |= names
    return flags, takes_value


def _is_engines(flags: Collection[str]) -> bool:
    """Whether a command has an engine's options, of which some are vLLM's by another name."""
    return "--page-size" in flags


def _next(rest: Iterator[str]) -> list[str]:
    return [argument for argument in (next(rest, None),) if argument is not None]
