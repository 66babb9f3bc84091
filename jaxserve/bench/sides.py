"""What benchmarks that compare several engines in one run share."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.bench.stepping import Driver, SteppedRecord
from jaxserve.bench.workloads import TokenSource
from jaxserve.core.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.core.config import EngineConfig
    from jaxserve.engine.engine import Engine

BuildEngine = Callable[["EngineConfig"], "Engine"]
MakeDriver = Callable[["Engine"], Driver]


def in_turns(names: Sequence[str], round_number: int) -> Sequence[str]:
    """The sides in the order of this round: every other round goes backwards.

    A machine that slowly warms up or cools down then favours nobody.
    """
    return list(names) if round_number % 2 == 0 else list(reversed(names))


def token_source(driver: Driver) -> TokenSource:
    """Draws prompts for a side's model."""
    info = driver.engine.info
    return TokenSource(info.vocab_size, info.eos_token_ids)


def prefill_figures(records: Sequence[SteppedRecord]) -> dict[str, float]:
    """Times to the first token (seconds), and prompt tokens offered and computed."""
    ttft = ttfts(records)
    offered = sum(r.prompt_len for r in records)
    return {
        "mean_ttft": float(ttft.mean()),
        "p99_ttft": float(np.percentile(ttft, 99)),
        "prefill_tokens_offered": offered,
        "prefill_tokens_computed": offered - sum(r.num_cached_tokens for r in records),
    }


def ttfts(records: Sequence[SteppedRecord]) -> np.ndarray:
    """Seconds to the first token, float64 [records]."""
    return np.array([r.delta_times[0] - r.start for r in records])


def count_differing(records: Sequence[SteppedRecord], others: Sequence[SteppedRecord]) -> int:
    """How many answers of two sides are not the same tokens.

    Raises:
        ValueError: the sides did not answer the same number of requests.
    """
    return sum(a.token_ids != b.token_ids for a, b in zip(records, others, strict=True))


def identity(differing: int, total: int) -> str:
    """Whether answers are the same, in words."""
    if differing:
        return f"{differing} of {total} answers DIFFER"
    return f"all {total} answers identical"


def require_positive(spec: Any) -> None:
    """Refuse a dataclass with a number that is not positive (but a seed may be 0).

    Raises:
        ConfigError: it names the field.
    """
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.name != "seed" and isinstance(value, int | float) and not value > 0:
            raise ConfigError(f"{field.name} must be positive, got {value}")
