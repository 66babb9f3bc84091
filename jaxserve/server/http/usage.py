"""How many tokens a request took, over all its choices."""

from typing import Any

from jaxserve.engine.outputs import TokenDelta


class UsageCount:
    """Counts from deltas; a prompt with several choices counts once.

    Args:
        num_choices: of the request.
        n: choices per prompt; those of one prompt follow each other.
        counts_output: whether generated tokens are part of the answer.
    """

    def __init__(self, num_choices: int, n: int, *, counts_output: bool = True) -> None:
        self._n = n
        self._counts_output = counts_output
        self._prompt = [0] * (num_choices // n)
        self._cached = [0] * (num_choices // n)
        self._output = [0] * num_choices

    def count(self, choice: int, delta: TokenDelta) -> None:
        """Take a delta's counts, which are totals of its choice."""
        self._output[choice] = delta.num_output_tokens
        if choice % self._n == 0:
            prompt = choice // self._n
            self._prompt[prompt] = delta.num_prompt_tokens
            self._cached[prompt] = delta.num_cached_tokens

    def totals(self) -> dict[str, Any]:
        """OpenAI's usage object, as of now."""
        prompt = sum(self._prompt)
        output = sum(self._output) if self._counts_output else 0
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached)},
        }
