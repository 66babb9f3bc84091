"""How many tokens a request took, over all its choices."""

from collections.abc import Sequence
from typing import Any

from jaxserve.engine.outputs import TokenDelta
from jaxserve.server.reasoning.thought_tokens import ThoughtTokens


class UsageCount:
    """Counts from deltas; a prompt with several choices counts once.

    Args:
        num_choices: of the request.
        n: choices per prompt; those of one prompt follow each other.
        thoughts: of each choice, counts its thoughts; none if there are none to tell apart, None
            to leave them out of the usage.
    """

    def __init__(
        self,
        num_choices: int,
        n: int,
        *,
        thoughts: Sequence[ThoughtTokens] | None = None,
    ) -> None:
        self._thoughts = thoughts
        self._n = n
        self._prompt = [0] * (num_choices // n)
        self._cached = [0] * (num_choices // n)
        self._output = [0] * num_choices

    def count(self, choice: int, delta: TokenDelta) -> None:
        """Take a delta's counts, which are totals of its choice."""
        self._output[choice] = delta.num_output_tokens
        if self._thoughts:
            self._thoughts[choice].push(delta.token_ids)
        if choice % self._n == 0:
            prompt = choice // self._n
            self._prompt[prompt] = delta.num_prompt_tokens
            self._cached[prompt] = delta.num_cached_tokens

    def totals(self) -> dict[str, Any]:
        """OpenAI's usage object, as of now."""
        prompt = sum(self._prompt)
        output = sum(self._output)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached)},
        }
        if self._thoughts is not None:
            reasoning = sum(thoughts.count for thoughts in self._thoughts)
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        return usage
