"""What benchmarks that compare several engines in one run share."""

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from tqdm import tqdm

from jaxserve.bench.stepping import Driver, SteppedRecord
from jaxserve.bench.workloads import TokenSource

if TYPE_CHECKING:
    from jaxserve.core.config import EngineConfig
    from jaxserve.engine.engine import Engine

Name = TypeVar("Name")
Figures = TypeVar("Figures")


def build_quietly(config: "EngineConfig") -> "Engine":
    """An engine of these options, built without progress bars."""
    from jaxserve.engine import build

    return build.build_sync_engine(config, progress=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sides:
    """Builds the engines that a benchmark compares, and lets them take turns.

    Attributes:
        build: makes an engine.
        driver: steps it.
        progress: whether bars are shown on stderr.
    """

    build: Callable[["EngineConfig"], "Engine"] = build_quietly
    driver: Callable[["Engine"], Driver] = Driver
    progress: bool = False

    def open(self, configs: Mapping[str, "EngineConfig"]) -> dict[str, Driver]:
        """An engine of its own for each side, all of them beside each other."""
        return {name: self.driver(self.build(config)) for name, config in configs.items()}

    @contextlib.contextmanager
    def alone(self, config: "EngineConfig") -> Iterator[Driver]:
        """An engine that has no other one beside it, and is closed in the end."""
        gc.collect()  # the engine before this one: two would need twice the memory
        driver = self.driver(self.build(config))
        try:
            yield driver
        finally:
            driver.engine.close()

    def title(self, text: str) -> str | None:
        """What a bar of requests is to be called; None for no bar."""
        return text if self.progress else None

    def take_turns(
        self, names: Sequence[Name], rounds: int, run: Callable[[Name, int], Figures]
    ) -> dict[Name, list[Figures]]:
        """Run every side in every round; every other round goes backwards.

        A machine that slowly warms up or cools down then favours nobody.

        Args:
            names: the sides, in order.
            rounds: how often each is run.
            run: one side's round, given its name and the round's number (from 0).

        Returns:
            What `run` said, by side and then by round.
        """
        results: dict[Name, list[Figures]] = {name: [] for name in names}
        with tqdm(total=rounds * len(names), unit="run", disable=not self.progress) as bar:
            for number in range(rounds):
                for name in names if number % 2 == 0 else reversed(names):
                    side = " ".join(map(str, name)) if isinstance(name, tuple) else str(name)
                    bar.set_description(f"{side}, round {number + 1}" if rounds > 1 else side)
                    results[name].append(run(name, number))
                    bar.update()
        return results


def token_source(driver: Driver) -> TokenSource:
    """Draws prompts for a side's model."""
    info = driver.engine.info
    return TokenSource(info.vocab_size, info.eos_token_ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillFigures:
    """Times to the first token (seconds), and prompt tokens offered and computed."""

    mean_ttft: float
    p99_ttft: float
    prefill_tokens_offered: int
    prefill_tokens_computed: int

    def computed(self) -> str:
        """How many prompt tokens were computed, in words."""
        return f"{self.prefill_tokens_computed} of {self.prefill_tokens_offered}"


def prefill_figures(records: Sequence[SteppedRecord]) -> PrefillFigures:
    """What became of the records' prompts."""
    ttft = ttfts(records)
    offered = sum(r.prompt_len for r in records)
    return PrefillFigures(
        mean_ttft=float(ttft.mean()),
        p99_ttft=float(np.percentile(ttft, 99)),
        prefill_tokens_offered=offered,
        prefill_tokens_computed=offered - sum(r.num_cached_tokens for r in records),
    )


def ttfts(records: Sequence[SteppedRecord]) -> np.ndarray:
    """Seconds to the first token, float64 [records]."""
    return np.array([r.delta_times[0] - r.start for r in records])


def differing_answers(
    answers: Mapping[str, Sequence[Sequence[int]]], *, cut: bool = False
) -> dict[str, int]:
    """How many answers of each side are not the first side's, token for token.

    Args:
        answers: by side, all in the same order.
        cut: whether answers are compared only as far as both came.

    Raises:
        ValueError: the sides did not answer the same number of requests.
    """
    first, *others = answers
    return {
        name: sum(
            any(x != y for x, y in zip(a, b, strict=False)) or (len(a) != len(b) and not cut)
            for a, b in zip(answers[first], answers[name], strict=True)
        )
        for name in others
    }


def identity(differing: int, total: int) -> str:
    """Whether answers are the same, in words."""
    if differing:
        return f"{differing} of {total} answers DIFFER"
    return f"all {total} answers identical"
