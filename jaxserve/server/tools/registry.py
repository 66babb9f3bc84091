"""All formats of tool calls by name, and which one a model has."""

from jaxserve.core.errors import ConfigError
from jaxserve.server.tools.format import ToolFormat
from jaxserve.server.tools.gemma import GemmaFormat
from jaxserve.server.tools.hermes import HermesFormat
from jaxserve.server.tools.llama3 import Llama3Format

TOOL_FORMATS: dict[str, type[ToolFormat]] = {
    "hermes": HermesFormat,
    "llama3": Llama3Format,
    "gemma": GemmaFormat,
}
TOOL_PARSER_NAMES = ("auto", *TOOL_FORMATS)


def tool_format(name: str, *, chat_template: str | None, family: str) -> ToolFormat:
    """The format of this name, or the one that a model's chat template speaks of.

    Where the template speaks of none the model's family decides, and `hermes`, which most models
    have seen, is what is left.

    Args:
        name: of `TOOL_PARSER_NAMES`.
        chat_template: the model's, if it has one.
        family: the model's.

    Raises:
        ConfigError: there is no such format.
    """
    if name == "auto":
        name = _guess(chat_template or "", family)
    if name not in TOOL_FORMATS:
        raise ConfigError(
            f"no tool call parser {name!r}; there are: {', '.join(TOOL_PARSER_NAMES)}"
        )
    return TOOL_FORMATS[name]()


def _guess(template: str, family: str) -> str:
    if "<tool_call>" in template:
        return "hermes"
    if "<|python_tag|>" in template or "<|start_header_id|>" in template:
        return "llama3"
    if "<start_of_turn>" in template or family.startswith("gemma"):
        return "gemma"
    return "hermes"
