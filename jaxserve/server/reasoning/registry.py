"""All markers of thinking by name."""

from jaxserve.core.errors import ConfigError
from jaxserve.server.reasoning.think import ThinkFormat

THINK_FORMATS: dict[str, ThinkFormat] = {
    "think": ThinkFormat("<think>", "</think>"),  # DeepSeek R1, Qwen 3 and most others
    "seed": ThinkFormat("<seed:think>", "</seed:think>"),  # Seed OSS
}
REASONING_PARSER_NAMES = ("none", *THINK_FORMATS)


def think_format(name: str) -> ThinkFormat | None:
    """The markers of this name, or None for `none`.

    Raises:
        ConfigError: there are none of that name.
    """
    if name not in REASONING_PARSER_NAMES:
        raise ConfigError(
            f"no reasoning parser {name!r}; there are: {', '.join(REASONING_PARSER_NAMES)}"
        )
    return THINK_FORMATS.get(name)
