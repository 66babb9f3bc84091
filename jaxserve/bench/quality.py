"""What formats of weights, activations and KV cost in quality: perplexity and likeliest tokens.

Every side reads the same text in the same windows, each token foretold from those before it in its
window. Perplexity is exp of the mean negative log-probability; the share of equal tokens is how
often a side's likeliest next token is the first side's.
"""

import dataclasses
import gc
import math
import pydoc_data.topics
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

from jaxserve.bench.settings import QualitySpec
from jaxserve.bench.tables import Result, tabulate
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.quality_bars import OPTIONS, bar_of
from jaxserve.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.llm import LLM


class _Reading(NamedTuple):
    """What one side made of the text: a number and a token per token foretold."""

    logprobs: list[float]
    likeliest: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityFigures:
    """One side's quality.

    Attributes:
        perplexity: of the text.
        perplexity_change: over the first side's, as a part of it.
        equal_tokens: part of the positions at which the likeliest token is the first side's.
        bar: what the change may be (`core.quality_bars`); None: nothing is said.
    """

    perplexity: float
    perplexity_change: float
    equal_tokens: float
    bar: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityResult(Result):
    """Quality by side.

    Attributes:
        text: what was read.
        num_tokens: that were foretold.
        window: tokens read at a time.
        sides: what every side came to; the first is what the others are compared with.
    """

    text: str
    num_tokens: int
    window: int
    sides: dict[str, QualityFigures]

    def __str__(self) -> str:
        table = tabulate(
            "side", self.sides,
            {
                "perplexity": lambda one: f"{one.perplexity:.4f}",
                "change": lambda one: f"{100 * one.perplexity_change:+.2f} %",
                "bar": lambda one: "" if one.bar is None else f"{100 * one.bar:.1f} %",
                "equal tokens": lambda one: f"{100 * one.equal_tokens:.2f} %",
            },
        )  # fmt: skip
        return f"{self.num_tokens} tokens of {self.text}, {self.window} at a time\n\n{table}"


def default_text() -> tuple[str, str]:
    """(what it is, the text): the topics of Python's `help()`, which every Python has."""
    topics = pydoc_data.topics.topics
    version = ".".join(map(str, sys.version_info[:2]))
    return f"help topics of Python {version}", "\n\n".join(topics[name] for name in sorted(topics))


def side_options(side: str) -> dict[str, str]:
    """The engine's options that a side such as `int4:int8:bfloat16` stands for.

    Raises:
        ConfigError: it has more parts than there are options.
    """
    parts = side.split(":")  # those left out are "auto"
    if len(parts) > len(OPTIONS):
        raise ConfigError(f"a side is {':'.join(OPTIONS)}, not {side!r}")
    return dict(zip(OPTIONS, parts, strict=False))


def measure_quality(
    config: EngineConfig,
    spec: QualitySpec,
    build: Callable[..., "LLM"],
    *,
    progress: bool = True,
) -> QualityResult:
    """Read a text with every side.

    Args:
        config: the engine's other options.
        spec: the text and the sides.
        build: makes an `LLM` of an engine's options.
        progress: show bars on stderr.

    Raises:
        ConfigError: a side is none, or the text is too short.
    """
    # All of them are checked before the first is built.
    configs = {side: dataclasses.replace(config, **side_options(side)) for side in spec.sides}
    name, text = default_text() if spec.text is None else (spec.text.name, _read(spec))
    readings: dict[str, _Reading] = {}
    for side, chosen in configs.items():
        gc.collect()  # the engine before this one: two would need twice the memory
        with closing(build(**dataclasses.asdict(chosen))) as llm:
            windows = _windows(llm, text, spec)
            readings[side] = _read_windows(llm, windows, progress=progress)
    first = readings[spec.sides[0]]
    base = _perplexity(first)
    return QualityResult(
        text=name,
        num_tokens=len(first.logprobs),
        window=spec.window,
        sides={
            side: QualityFigures(
                perplexity=_perplexity(one),
                perplexity_change=_perplexity(one) / base - 1,
                equal_tokens=_equal(one.likeliest, first.likeliest),
                bar=bar_of(side_options(side)),
            )
            for side, one in readings.items()
        },
    )


def _read(spec: QualitySpec) -> str:
    assert spec.text is not None
    try:
        return spec.text.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text cannot be read: {error}") from error


def _windows(llm: "LLM", text: str, spec: QualitySpec) -> list[list[int]]:
    """The text's first tokens, in windows of equal length, each begun as a text begins."""
    # A token is rarely more than eight characters: this does not tokenise what is not read.
    tokens = llm.tokenizer.encode(text[: 8 * spec.num_tokens], add_special_tokens=False)
    start = llm.tokenizer.encode("", add_special_tokens=True)
    own = spec.window - len(start)
    count = min(len(tokens), spec.num_tokens) // own
    if count < 1:
        raise ConfigError(
            f"the text has {len(tokens)} tokens, and window {spec.window} takes {own} at a time"
        )
    return [[*start, *tokens[i * own : (i + 1) * own]] for i in range(count)]


def _read_windows(llm: "LLM", windows: Sequence[list[int]], *, progress: bool) -> _Reading:
    params = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=1)
    prompts = [{"prompt_token_ids": window} for window in windows]
    reading = _Reading([], [])
    for output in llm.generate(prompts, params, use_tqdm=progress):
        assert output.prompt_logprobs is not None
        for token, found in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
            if found is not None:
                reading.logprobs.append(found[token].logprob)
                reading.likeliest.append(min(found, key=lambda one, at=found: at[one].rank))
    return reading


def _perplexity(reading: _Reading) -> float:
    return math.exp(-math.fsum(reading.logprobs) / len(reading.logprobs))


def _equal(tokens: Sequence[int], others: Sequence[int]) -> float:
    same = sum(a == b for a, b in zip(tokens, others, strict=True))
    return same / len(tokens)
