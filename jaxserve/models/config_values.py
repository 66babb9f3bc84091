"""Values of a model's configuration, taken from files that may hold anything."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.core.errors import ConfigError

MAX_SIZE = 2**31 - 1  # what sizes and token ids fit into on a device
_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class ConfigValues:
    """A mapping whose values are checked when they are taken.

    Attributes:
        values: name -> value, of any type.
        where: what to call the mapping in messages.
        prefix: stands before every name in the mapping, and in messages.
        allow_unknown: whether keys that are not known are passed over, see `check_keys`.
    """

    values: Mapping[str, Any]
    where: str
    prefix: str = ""
    allow_unknown: bool = False

    def get(self, name: str) -> Any:
        """The value of that name as it is, None if there is none."""
        return self.values.get(self.prefix + name)

    def integer(
        self, name: str, default: Any = _REQUIRED, *, least: int = 1, most: int = MAX_SIZE
    ) -> Any:
        """A whole number from `least` to `most`, or the default.

        Raises:
            ConfigError: it is something else, or is missing and there is no default.
        """
        value = self._present(name, default)
        if value is default:
            return value
        whole = _whole(value)
        if whole is None or not least <= whole <= most:
            raise self._wrong(name, f"a whole number from {least} to {most}", value)
        return whole

    def number(self, name: str, default: Any = _REQUIRED, *, least: float = -math.inf) -> Any:
        """A finite number not below `least`, or the default.

        Raises:
            ConfigError: it is something else, or is missing and there is no default.
        """
        value = self._present(name, default)
        if value is default:
            return value
        found = _finite(value)
        if found is None or found < least:
            bound = "" if least == -math.inf else f" of at least {least:g}"
            raise self._wrong(name, f"a number{bound}", value)
        return found

    def positive(self, name: str, default: Any = _REQUIRED) -> Any:
        """A finite number above 0, or the default.

        Raises:
            ConfigError: it is something else, or is missing and there is no default.
        """
        value = self.number(name, default)
        if value is not default and value <= 0:
            raise self._wrong(name, "a number above 0", value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false.

        Raises:
            ConfigError: it is neither.
        """
        value = self._present(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def text(self, name: str, default: str) -> str:
        """A string.

        Raises:
            ConfigError: it is something else.
        """
        value = self._present(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        return value

    def mapping(self, name: str) -> "ConfigValues":
        """The object of that name; an empty one if there is none.

        Raises:
            ConfigError: it is something else.
        """
        value = self._present(name, {})
        if not isinstance(value, Mapping):
            raise self._wrong(name, "an object", value)
        where = f"{self.where}: {self.prefix}{name}"
        return ConfigValues(value, where, allow_unknown=self.allow_unknown)

    def sequence(self, name: str) -> Sequence[Any]:
        """The list of that name; an empty one if there is none.

        Raises:
            ConfigError: it is something else.
        """
        value = self._present(name, ())
        if not isinstance(value, list | tuple):
            raise self._wrong(name, "a list", value)
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Token ids, of which the file may have one, a list, or none; -1 stands for none.

        Raises:
            ConfigError: it is something else.
        """
        value = self._present(name, ())
        ids = []
        for item in value if isinstance(value, list | tuple) else [value]:
            token = _whole(item)
            if token is None or not -1 <= token <= MAX_SIZE:
                raise self._wrong(name, "a token id or a list of them", value)
            ids.append(token)
        return tuple(token for token in ids if token >= 0)

    def _present(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ConfigError(f"{self.where} lacks {self.prefix}{name}")
        return default

    def _wrong(self, name: str, wanted: str, value: Any) -> ConfigError:
        return ConfigError(
            f"{self.where}: {self.prefix}{name} must be {wanted}, not {shortened(value)}"
        )


def expand_window(window: int, num_layers: int, pattern: int | None) -> tuple[int | None, ...]:
    """One window per layer; every `pattern`-th layer (None: no layer) attends fully."""
    return tuple(
        None if pattern and (layer + 1) % pattern == 0 else window for layer in range(num_layers)
    )


def shortened(value: Any) -> str:
    """A value for a message: of any size, in 60 characters at most."""
    text = repr(value[:20]) if isinstance(value, str | list | tuple) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _whole(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not value.is_integer():
        return None
    return int(value)


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
