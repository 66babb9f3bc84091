"""What every benchmark can be told: dataclasses from which the commands' flags are made.

Nothing heavy is imported here, so that `--help` is instant; what a number means for the
measurement stands in the benchmark's own module.
"""

import dataclasses
from typing import Any

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.options import NOT_NEGATIVE, POSITIVE, check_options, option

LEARNED = ("exact", "range", "rank")  # the length predictors that learn
SMALLEST_CHUNK = 8  # the streams last while the prompt gets so many tokens per step, or more


def setting(
    default: Any,
    help: str,
    *,
    range: str = POSITIVE,
    choices: tuple[str, ...] = (),
    flag: str | None = None,
) -> Any:
    """A field that is a flag, as `core.options.option` makes it; numbers are positive."""
    return option(default, help, range=range, choices=choices, flag=flag)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Base of all settings of benchmarks.

    Raises:
        ConfigError: a value is out of its range, or none of its choices.
    """

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FairnessSpec(Spec):
    """What two tenants send; lengths in tokens."""

    light_requests: int = setting(24, "Requests of the tenant that sends less.")
    ratio: int = setting(10, "The other one sends so many times as many.")
    input_len: int = setting(64, "Tokens per prompt.")
    output_len: int = setting(32, "Tokens per answer.")
    rounds: int = setting(2, "Rounds of each policy.")
    seed: int = 0

    @property
    def num_requests(self) -> int:
        """Requests of both tenants."""
        return self.light_requests * (1 + self.ratio)

    @property
    def request_len(self) -> int:
        """Tokens of one request, in and out."""
        return self.input_len + self.output_len


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkedPrefillSpec(Spec):
    """Streams, the prompt that arrives beside them, and how it may be fitted in.

    Raises:
        ConfigError: a budget leaves no room beside the streams.
    """

    num_streams: int = setting(8, "Requests that decode when the prompt arrives.")
    stream_prompt_len: int = setting(32, "Tokens of each one's prompt.")
    prompt_len: int = setting(2000, "Tokens of the prompt that arrives.")
    steady_tokens: int = setting(16, "Tokens that each stream has by then.")
    answer_len: int = setting(8, "Tokens answered to the prompt.")
    budgets: tuple[int, ...] = setting(
        (32, 64, 128, 256, 512), "Fixed token budgets; the other sides have the largest."
    )
    tpot_ms: float | None = setting(
        None, "Longest step of the side tpot (default: three times the streams' steady gap)."
    )
    rounds: int = setting(3, "Rounds that count; each side's median is shown.")
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.num_streams + SMALLEST_CHUNK
        if min(self.budgets) < least:
            raise ConfigError(
                f"a budget of {min(self.budgets)} leaves too little room for the prompt beside "
                f"{self.num_streams} streams; it must be at least {least}"
            )

    @property
    def stream_len(self) -> int:
        """Tokens that each stream may generate: more than the rest of a round takes."""
        return self.steady_tokens + self.prompt_len // SMALLEST_CHUNK + 2 * self.answer_len + 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixCacheSpec(Spec):
    """Which parts to run; both, if none is named."""

    parts: tuple[str, ...] = setting(
        ("shared", "chat"), "What to run; may be given twice.", choices=("shared", "chat"),
        flag="--part",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedSpec(Spec):
    """Part `shared`: lengths in tokens."""

    num_requests: int = setting(32, "shared: requests per round.")
    prefix_len: int = setting(512, "shared: tokens of the system prompt.")
    suffix_len: int = setting(32, "shared: tokens that are each request's own.")
    output_len: int = setting(32, "shared: tokens per answer.")
    request_rate: float | None = setting(
        None, "shared: requests per second (default: all at once)."
    )
    rounds: int = setting(2, "shared: rounds, each with a system prompt of its own.")
    seed: int = 0

    @property
    def request_len(self) -> int:
        """Tokens of one request, in and out."""
        return self.prefix_len + self.suffix_len + self.output_len


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatSpec(Spec):
    """Part `chat`: lengths in tokens.

    Raises:
        ConfigError: there is nothing that a small pool could not hold.
    """

    num_sessions: int = setting(6, "chat: sessions; the device has room for two.")
    num_turns: int = setting(10, "chat: turns of each session.")
    message_len: int = setting(32, "chat: new tokens per turn.")
    answer_len: int = setting(64, "chat: tokens answered per turn.")
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_sessions < 3:
            raise ConfigError("there must be at least 3 sessions: the device has room for 2")
        if self.num_turns < 2:
            raise ConfigError("a chat has at least 2 turns")

    @property
    def session_len(self) -> int:
        """Tokens of a whole conversation."""
        return self.num_turns * (self.message_len + self.answer_len)

    @property
    def restart_turn(self) -> int:
        """The first turn (from 0) after the restart."""
        return self.num_turns // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoliciesSpec(Spec):
    """The trace, whose prompts get answers of one word to `max_output_len` tokens, and its sides.

    Raises:
        ConfigError: there is no such side, or one twice.
    """

    sides: tuple[str, ...] = setting(
        ("fcfs", "sjf:oracle", "srtf:oracle", "srtf:exact", "mlfq", "ltr:rank", "deadline",
         "priority"),
        "POLICY or POLICY:PREDICTOR, with commas between; the others are compared with the first.",
    )  # fmt: skip
    num_requests: int = setting(160, "Requests of the trace.")
    num_lessons: int = setting(
        192, "Other prompts, answered before, that predictors learn from.", range=NOT_NEGATIVE
    )
    long_share: float = setting(0.15, "Share of prompts that ask for long answers.", range="[0, 1]")
    max_output_len: int = setting(512, "Longest answer, in tokens.")
    load: float = setting(0.9, "Arrivals, as a share of the capacity measured first.")
    burstiness: float = setting(
        0.1, "Shape of the gamma-distributed gaps: 1 is a Poisson process, less is burstier."
    )
    ttft_target: float = setting(
        1.0, "Seconds, of the interactive half; ten times that for the others."
    )
    tpot_target: float = setting(0.2, "Seconds per token after the first, of all.")
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.sides)) < len(self.sides):
            raise ConfigError("there must be no side twice")
        for side in self.sides:
            EngineConfig(**side_options(side))  # it knows which names there are


def side_options(side: str) -> dict[str, Any]:
    """The engine's options that `POLICY` or `POLICY:PREDICTOR` stands for."""
    policy, _, predictor = side.partition(":")
    return {"policy": policy, "length_predictor": predictor or "none"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictorSpec(Spec):
    """What is asked, and how the answers are used."""

    predictors: tuple[str, ...] = setting(LEARNED, "With commas between.", choices=LEARNED)
    num_prompts: int = setting(400, "Different chat prompts that are answered.")
    max_output_len: int = setting(256, "Longest answer, in tokens.")
    train_share: float = setting(0.7, "Share of the answers that is learned from.", range="(0, 1)")
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrammarSpec(Spec):
    """Random schemas, and how they are answered."""

    num_schemas: int = setting(1000, "Schemas, each for one answer.")
    max_tokens: int = setting(
        256, "Tokens per answer at most; answers cut by it are counted apart."
    )
    max_depth: int = setting(3, "How deep objects and arrays are nested.")
    temperature: float = setting(1.0, "Of the sampling.")
    rounds: int = setting(
        4, "Parts in which the schemas are run, with and without grammars in turns."
    )
    seed: int = 0
