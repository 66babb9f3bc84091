"""How much one request may ask for."""

import dataclasses

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.options import AT_LEAST_ONE, check_number


def _limit(default: int, help: str) -> int:
    """A limit that is also a command-line flag."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """Bounds on single requests; larger ones are refused before they cost anything.

    Each is a flag of `jaxserve serve`, whose help says what it bounds.

    Raises:
        ConfigError: a limit is not positive.
    """

    max_n: int = _limit(16, "answers to one prompt")
    max_prompts: int = _limit(2048, "prompts in one HTTP request")
    default_max_tokens: int = _limit(4096, "tokens of an answer whose request does not say")
    max_prompt_chars: int = _limit(2**20, "characters of a prompt, or of all messages of a chat")
    max_grammar_chars: int = _limit(
        2**16, "characters of a grammar, a JSON schema or a tool's parameters"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_number(field.name, getattr(self, field.name), AT_LEAST_ONE)

    def check(self, limit: str, value: int, param: str) -> None:
        """Refuse a request that asks for more than a limit.

        Args:
            limit: which, by its field's name.
            value: what the request asks for.
            param: the request's parameter, for the message.

        Raises:
            InvalidRequest: it is more.
        """
        most = getattr(self, limit)
        if value > most:
            raise InvalidRequest(f"{param}: {value} is more than the {most} allowed", param=param)
