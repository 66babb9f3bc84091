"""Command-line options made from dataclasses of settings, and the base of every command."""

import dataclasses
import functools
import re
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import click

from jaxserve.cli.vllm_flags import likely_meant, translated
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import JaxserveError
from jaxserve.core.options import option_types

GROUP_TITLES = {
    "model": "Model",
    "device": "Device",
    "cache": "KV cache",
    "scheduling": "Scheduling",
}


class GroupedOption(click.Option):
    """An option with a heading of its own group in `--help`."""

    def __init__(self, *args: Any, group: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group

    def get_help_extra(self, ctx: click.Context) -> Any:
        """What stands in brackets after the help; a default given as text stands as it is."""
        extra = super().get_help_extra(ctx)
        if isinstance(self.show_default, str):  # which click puts in parentheses
            extra["default"] = self.show_default
        return extra


class ListOf(click.ParamType):
    """Values with commas between, as a tuple."""

    def __init__(self, kind: type[int] | type[float] | type[str]) -> None:
        self._kind = kind
        self.name = f"{'text' if kind is str else 'number'},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text; a default that is a tuple already stays as it is."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._kind(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers", param, ctx)


class Command(click.Command):
    """A command whose `--help` shows options under group headings, and that knows vLLM's names.

    A `JaxserveError` ends it with the error's message and exit status, no traceback.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse arguments; those of vLLM's names that mean the same here are ours."""
        try:
            return super().parse_args(ctx, translated(args, self, ctx))
        except click.NoSuchOption as error:
            meant = " or ".join(likely_meant(error.option_name, self, ctx))
            hint = f" Did you mean {meant}?" if meant else ""
            message = f"No such option {error.option_name!r}.{hint}"
            raise click.NoSuchOption(error.option_name, message, ctx=ctx) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, with jaxserve's errors shown as messages."""
        try:
            return super().invoke(ctx)
        except JaxserveError as error:
            click.ClickException(str(error)).show()
            ctx.exit(error.exit_status)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's own options, then each group's under its title."""
        groups: dict[str | None, list[tuple[str, str]]] = {None: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                groups.setdefault(getattr(parameter, "group", None), []).append(record)
        for group in sorted(groups, key=_group_order):
            if groups[group]:
                title = GROUP_TITLES.get(group, group.capitalize()) if group else None
                with formatter.section(f"{title} options" if title else "Options"):
                    formatter.write_dl(groups[group])


def _group_order(group: str | None) -> int:
    known = [None, *GROUP_TITLES]
    return known.index(group) if group in known else len(known)


def engine_options(
    function: Callable[..., Any] | None = None,
    *,
    include: Collection[str] | None = None,
    exclude: Collection[str] = (),
    model_argument: bool = True,
    model_required: bool = True,
    defaults: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Give a command the engine's options, and its function a ready `config: EngineConfig`.

    Use it below `@click.command(cls=Command)`, with or without parentheses.

    Args:
        function: the command's function (when used without parentheses).
        include: fields to offer; None offers all. Fields not offered keep their defaults.
        exclude: fields not to offer.
        model_argument: whether the field `model` is the positional argument MODEL.
        model_required: whether MODEL must be given (otherwise its default is used).
        defaults: other defaults than `EngineConfig`'s, for this command.
    """
    if function is None:
        return functools.partial(
            engine_options,
            include=include,
            exclude=exclude,
            model_argument=model_argument,
            model_required=model_required,
            defaults=defaults,
        )
    defaults = dict(defaults or {})
    unknown = ({*(include or ()), *exclude, *defaults}) - {f.name for f in _fields()}
    if unknown:
        raise ValueError(f"not fields of EngineConfig: {sorted(unknown)}")
    offered = [
        field
        for field in _fields()
        if field.name not in exclude and (include is None or field.name in include)
    ]

    @functools.wraps(function)
    def with_config(*args: Any, **kwargs: Any) -> Any:
        config = _build(EngineConfig, offered, kwargs, defaults)
        return function(*args, config=config, **kwargs)

    for field in reversed(offered):
        default = defaults.get(field.name, field.default)
        if field.name != "model":
            with_config = _click_option(EngineConfig, field, default)(with_config)
        elif model_argument:
            # Click takes any default for a value that was given, None too.
            attributes = {} if model_required else {"default": default}
            with_config = click.argument("model", required=model_required, **attributes)(
                with_config
            )
    return with_config


def settings_options(kind: type, parameter: str = "spec") -> Callable[..., Any]:
    """Give a command the options of a dataclass, and its function a ready one.

    A field that is none (see `core.options.option`) and is called `seed` is the engine's, if the
    command has an engine's options, which then stand above these.

    Args:
        kind: a dataclass; a field `num_prompts` is the flag `--num-prompts`.
        parameter: the function's parameter that takes it.
    """
    offered = [field for field in dataclasses.fields(kind) if field.metadata]
    has_seed = any(f.name == "seed" and not f.metadata for f in dataclasses.fields(kind))

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def with_settings(*args: Any, **kwargs: Any) -> Any:
            seed = {"seed": kwargs["config"].seed} if has_seed and "config" in kwargs else {}
            settings = _build(kind, offered, kwargs, seed)
            return function(*args, **{parameter: settings}, **kwargs)

        for field in reversed(offered):
            with_settings = _click_option(kind, field, field.default)(with_settings)
        return with_settings

    return decorate


def _build(
    kind: type, offered: Collection[dataclasses.Field], kwargs: dict[str, Any], others: Mapping
) -> Any:
    """The dataclass, its fields taken out of a command's parameters.

    Raises:
        UsageError: values that it refuses.
    """
    values = {field.name: kwargs.pop(field.name) for field in offered if field.name in kwargs}
    try:
        return kind(**{**others, **values})
    except JaxserveError as error:
        flags = {field.name: _flag(kind, field).split("/")[0] for field in offered}
        raise click.UsageError(in_flags(str(error), flags)) from error


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message about settings with their names as they are given on a command line.

    Args:
        message: what is wrong; a name that is a common word is only known where it begins.
        flags: the flag of every name.
    """
    first, space, rest = message.partition(" ")
    names = [name for name in flags if "_" in name]
    for name in sorted(names, key=len, reverse=True):
        rest = re.sub(rf"(?<![\w-]){name}(?!\w)", flags[name], rest)
    return flags.get(first, first) + space + rest


def _fields() -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(EngineConfig)


def _flag(kind: type, field: dataclasses.Field) -> str:
    flag = field.metadata["flag"] or "--" + field.name.replace("_", "-")
    return f"{flag}/--no-{flag[2:]}" if option_types(kind)[field.name].kind is bool else flag


def _click_option(kind: type, field: dataclasses.Field, default: Any) -> Callable[..., Any]:
    choices, hint = field.metadata["choices"], option_types(kind)[field.name].kind
    attributes: dict[str, Any] = {"type": click.Choice(choices) if choices else hint}
    shown: bool | str = default not in (None, "")
    if hint is bool:
        attributes["type"] = None
    elif hint is Path:
        attributes["type"] = click.Path(path_type=Path)
    elif typing.get_origin(hint) is tuple:
        # Given more than once, they add up.
        attributes = {
            "type": ListOf(typing.get_args(hint)[0]),
            "multiple": True,
            "callback": lambda ctx, param, lists: sum(lists, ()) or None,
        }
        if default:
            shown, default = ",".join(map(str, default)), [default]
    return click.option(
        _flag(kind, field),
        field.name,
        cls=GroupedOption,
        group=field.metadata["group"],
        default=default,
        show_default=shown,
        help=sentence(field.metadata["help"]),
        **attributes,
    )


def sentence(help: str) -> str:
    """A help text as a sentence, as `--help` shows them all."""
    return help if help.endswith(".") else f"{help[0].upper()}{help[1:]}."


def options_table() -> str:
    """All engine options as one Markdown table, for the README."""
    lines = ["| Option | Default | Meaning |", "| --- | --- | --- |"]
    group = None
    for field in _fields():
        if field.name == "model":
            continue
        if field.metadata["group"] != group:
            group = field.metadata["group"]
            lines.append(f"| **{GROUP_TITLES.get(group, group.capitalize())}** | | |")
        text = field.metadata["help"]
        if field.metadata["choices"]:
            text += f" ({', '.join(f'`{c}`' for c in field.metadata['choices'])})"
        default = field.default
        if isinstance(default, bool):
            default = "on" if default else "off"
        flag = f"`{_flag(EngineConfig, field)}`".replace("/", "` / `")
        shown = "" if default in (None, "") else f"`{default}`"
        lines.append(f"| {flag} | {shown} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"
