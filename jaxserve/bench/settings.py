"""What every benchmark can be told: dataclasses from which the commands' flags are made.

Nothing heavy is imported here, so that `--help` is instant; what a number means for the
measurement stands in the benchmark's own module.
"""

import dataclasses
import os
from pathlib import Path
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostCostSpec(Spec):
    """The load under which the host is measured.

    An answer ends with the step that brings its last token, and another request takes its place.
    """

    policies: tuple[str, ...] | None = setting(
        None, "With commas between (default: all).",
        choices=EngineConfig.__dataclass_fields__["policy"].metadata["choices"],
    )  # fmt: skip
    waiting: tuple[int, ...] = setting((100, 1000, 10_000), "Requests in the queue all along.")
    num_running: int = setting(256, "Requests that decode at the same time.", flag="--running")
    prompt_len: int = setting(400, "Tokens per prompt.", flag="--input-len")
    output_len: int = setting(512, "Tokens per answer.")
    num_steps: int = setting(300, "Steps that are timed.")
    step_ms: float | None = setting(
        None, "The device's time per step (default: measured on MODEL)."
    )

    @property
    def max_tokens_per_step(self) -> int:
        """A budget that leaves newcomers' prompts room beside all decodes."""
        return self.num_running + max(1024, self.prompt_len)

    @property
    def max_model_len(self) -> int:
        """Room for every prompt and its answer."""
        return self.prompt_len + self.output_len + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsSpec(Spec):
    """Which decode steps are timed.

    Raises:
        ConfigError: no context is longer than the one that every other is compared with.
    """

    rows: tuple[int, ...] = setting((1, 8, 32), "Requests that decode at the same time.")
    context_lens: tuple[int, ...] = setting((128, 512), "Tokens that each of them attends to.")
    rounds: int = setting(9, "Timed steps of each kind, in turns; the median counts.")
    beside_busy: int = setting(
        0, "Other processes that keep a core busy each, all the while.", range=NOT_NEGATIVE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.context_lens) < 2:
            raise ConfigError("context_lens must have one above 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpansSpec(Spec):
    """Into how many spans layers are cut, and which decode steps are timed.

    Raises:
        ConfigError: there is nothing to compare.
    """

    spans: tuple[int, ...] = setting((1, 5, 30), "Numbers of spans, with an engine each.")
    rows: tuple[int, ...] = setting((1, 8), "Requests that decode at the same time.")
    context_len: int = setting(128, "Tokens that each of them attends to.")
    rounds: int = setting(25, "Timed steps of each kind, in turns; the median counts.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.spans)) < 2:
            raise ConfigError("spans must have two numbers or more, to compare them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualitySpec(Spec):
    """What text is read, and by which sides."""

    text: Path | None = setting(None, "A text in UTF-8 (default: the topics of Python's help).")
    num_tokens: int = setting(20_000, "Tokens of it that are read.")
    window: int = setting(512, "Tokens at a time: none is foretold from more.")
    sides: tuple[str, ...] = setting(
        (
            "none",
            "auto",
            "int8",
            "int8:int8",
            "int4",
            "int4:int8",
            "fp8",
            "none:auto:bfloat16",
            "none:auto:int8",
            "none:auto:fp8",
        ),
        "QUANTIZATION[:ACTIVATION_DTYPE[:KV_CACHE_DTYPE]] each; the first is compared with.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketsSpec(Spec):
    """What buckets are chosen from, and by what.

    Raises:
        ConfigError: not exactly one source, or a cost that is measured and given.
    """

    trace: Path | None = setting(None, "A trace: Azure's .csv or Mooncake's .jsonl.")
    histogram: Path | None = setting(None, "What `jaxserve serve --step-histogram` wrote.")
    num_programs: int | None = setting(
        None, "Token buckets at most (default: as many as doubling ones)."
    )
    num_row_programs: int | None = setting(None, "Row buckets at most, likewise.")
    cost: str = setting(
        "tokens", "Minimise the tokens that are run, or the time of the steps.",
        choices=("tokens", "time"),
    )  # fmt: skip
    step_ms: tuple[float, ...] | None = setting(
        None, "The time of a step, BASE,PER_TOKEN (default: measured on MODEL).",
        range=NOT_NEGATIVE,
    )  # fmt: skip
    num_requests: int = setting(10_000, "Of a trace: its first ones.")
    length_scale: float = setting(1.0, "Of a trace: shorten prompts and answers.", range="(0, 1]")
    utilisation: float | None = setting(
        None, "Of a trace: stretch arrivals to this part of what the engine can do."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.trace is None) == (self.histogram is None):
            raise ConfigError("give either --trace or --histogram")
        if self.cost == "time" and self.step_ms is not None:
            raise ConfigError("--cost time is measured, it takes no --step-ms")
        if self.step_ms is not None and len(self.step_ms) != 2:
            raise ConfigError("--step-ms takes two numbers, BASE,PER_TOKEN")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaddingSpec(Spec):
    """How a trace is made to fit the machine, and what is compared on it.

    Raises:
        ConfigError: too few requests to choose from, or to serve.
    """

    trace: Path | None = setting(None, "A trace: Azure's .csv or Mooncake's .jsonl.")
    num_requests: int = setting(100, "Requests that are served, the trace's first.")
    num_calibration: int = setting(2000, "Requests after those, from which buckets are chosen.")
    length_scale: float = setting(
        0.125, "Shorten prompts and answers by this factor.", range="(0, 1]"
    )
    utilisation: float = setting(0.7, "Load, as a part of what the engine can do.")
    page_sizes: tuple[int, ...] = setting((64, 32, 16), "Tokens per KV page, one run each.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_requests < 2 or self.num_calibration < 2:
            raise ConfigError("there must be at least two requests of each kind")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontendSpec(Spec):
    """What gRPC and HTTP are to carry."""

    transports: tuple[str, ...] = setting(
        ("grpc", "sse"), "With commas between.", choices=("grpc", "sse")
    )
    num_streams: int = setting(256, "Streams at the same time.", flag="--streams")
    tokens_per_second: float = setting(20_000.0, "That the engine emits over all streams.")
    num_connections: int = setting(
        16, "Connections that gRPC's streams share.", flag="--connections"
    )
    seconds: float = setting(10.0, "How long to count.")
    warmup_seconds: float = setting(3.0, "How long to wait before.")
    num_stalled: int = setting(
        0, "Clients beside them that connect and stall; measured without them, too.",
        range=NOT_NEGATIVE, flag="--stalled",
    )  # fmt: skip

    @property
    def steps_per_second(self) -> float:
        """Of the paced engine, each of whose steps has a token for every stream."""
        return self.tokens_per_second / self.num_streams


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareSpec(Spec):
    """What other engines are compared by.

    Raises:
        ConfigError: there is no such interpreter.
    """

    concurrency: tuple[int, ...] = setting((1, 8, 32), "Prompts given to an engine at once.")
    input_len: int = setting(128, "Tokens per prompt.")
    output_len: int = setting(64, "Tokens per answer.")
    threads: int | None = setting(None, "CPU threads of every side (default: all CPUs).")
    repeats: int = setting(3, "Timed runs; their median counts.")
    sides: tuple[str, ...] = setting(
        ("jaxserve", "jaxserve@auto", "jaxserve@auto:int8", "jaxserve@int8:int8", "transformers",
         "llama.cpp", "llama.cpp@file", "llama.cpp@Q8_0", "llama.cpp@Q4_0"),
        "Engines, in float32 or @ a form of the weights: of ours QUANTIZATION[:ACTIVATIONS[:KV]], "
        "of llama.cpp `file` (as it is) or a type that it quantises to.",
    )  # fmt: skip
    peer_python: Path | None = setting(None, "Interpreter that has the peers installed.")
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peer_python is not None and not self.peer_python.is_file():
            raise ConfigError(f"there is no interpreter {self.peer_python}")

    @property
    def num_threads(self) -> int:
        """CPU threads of every side."""
        affinity = getattr(os, "sched_getaffinity", None)  # not on every system
        return self.threads or (len(affinity(0)) if affinity else os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartupSpec(Spec):
    """How often a server is started."""

    num_iters_cold: int = setting(3, "Starts with an empty compilation cache.")
    num_iters_warm: int = setting(3, "Starts with a filled one.", range=NOT_NEGATIVE)
    num_iters: int | None = setting(None, "Sets both.")
    timeout: float = setting(600.0, "Seconds that one start may take.")

    @property
    def num_cold(self) -> int:
        """Starts with an empty compilation cache."""
        return self.num_iters or self.num_iters_cold

    @property
    def num_warm(self) -> int:
        """Starts with a filled one."""
        return self.num_iters or self.num_iters_warm
