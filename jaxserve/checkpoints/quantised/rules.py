"""Which modules of a checkpoint a configuration means."""

import dataclasses
import re
from collections.abc import Callable, Iterable

from jaxserve.checkpoints.quantised.scheme import Scheme
from jaxserve.core.errors import ConfigError
from jaxserve.models.config_values import ConfigValues, shortened

Matcher = Callable[[str, str], bool]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Says how some modules' weights are stored.

    Attributes:
        matches: takes a module's name and its class ("Linear").
        scheme: how they are; None: not quantised.
    """

    matches: Matcher
    scheme: Scheme | None


def is_linear(module: str, kind: str) -> bool:
    """Whether it is a linear layer, whatever its name."""
    del module
    return kind == "Linear"


def named(names: Iterable[str]) -> Matcher:
    """Matches modules with one of these names, or inside one, or whose name ends with one.

    `mlp` means `model.layers.0.mlp.down_proj`, but `mlp.gate` does not mean `mlp.gate_proj`.
    """
    wanted = tuple(f".{name.strip('.')}." for name in names)
    return lambda module, kind: any(name in f".{module}." for name in wanted)


def matching(pattern: str, where: str) -> Matcher:
    """Matches modules whose name begins with a regular expression.

    Raises:
        ConfigError: it is none.
    """
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{where}: {pattern!r} is no regular expression: {error}") from None
    return lambda module, kind: found.match(module) is not None


def read_names(taken: ConfigValues, key: str) -> tuple[str, ...]:
    """A list of names; none if the key is not there.

    Raises:
        ConfigError: it is something else.
    """
    names = taken.get(key)
    if names is None:
        return ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{taken.where}: {key} = {shortened(names)} is not a list of names")
    return tuple(names)
