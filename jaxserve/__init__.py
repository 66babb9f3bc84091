"""jaxserve: an LLM inference server on XLA.

`LLM`, `SamplingParams` and `Grammar` are all that a notebook needs; the rest is reached through the
`jaxserve` command or the subpackages. Importing this package does not import JAX.
"""

from typing import TYPE_CHECKING, Any

from jaxserve.core.grammar import Grammar
from jaxserve.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.llm import LLM

__all__ = ["LLM", "Grammar", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from jaxserve.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
