"""How much one request may ask for."""

import dataclasses

from jaxserve.core.errors import ConfigError, InvalidRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """Bounds on single requests; larger ones are refused before they cost anything.

    Attributes:
        max_n: answers to one prompt.
        max_prompts: prompts in one HTTP request.
        max_prompt_chars: characters of one prompt, or of all messages of a chat.
        max_grammar_chars: characters of a grammar, a JSON schema or a tool's parameters.

    Raises:
        ConfigError: a limit is not positive.
    """

    max_n: int = 16
    max_prompts: int = 256
    max_prompt_chars: int = 2**20
    max_grammar_chars: int = 2**16

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(f"{field.name} must be at least 1")

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
