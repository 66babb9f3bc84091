"""Settings of benchmarks that put load on an engine or a server; flags derive from them."""

import dataclasses
from pathlib import Path

from jaxserve.bench.settings import Spec, setting
from jaxserve.core.errors import ConfigError
from jaxserve.core.options import NO_LIMIT, NOT_NEGATIVE, SEED

METRICS = ("ttft", "tpot", "itl", "e2el")
TRACES = ("azure", "mooncake")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkloadSpec(Spec):
    """The requests to send: made up, or a trace.

    Raises:
        ConfigError: a trace has no file, or the seed is negative.
    """

    dataset_name: str = setting(
        "random", "What to send; azure and mooncake are traces.",
        choices=("random", "prefix_repetition", *TRACES),
    )  # fmt: skip
    dataset_path: Path | None = setting(None, "The trace's file: Azure CSV or Mooncake JSONL.")
    num_prompts: int = setting(1000, "Number of requests (of a trace: its first ones).")
    seed: int = 0
    random_input_len: int = setting(1024, "random: tokens per prompt.")
    random_output_len: int = setting(128, "random: tokens per answer.")
    random_range_ratio: float = setting(
        0.0, "random: lengths vary evenly between (1 - ratio) and (1 + ratio) times.",
        range="[0, 1)",
    )  # fmt: skip
    prefix_repetition_prefix_len: int = setting(256, "prefix_repetition: tokens per prefix.")
    prefix_repetition_suffix_len: int = setting(256, "prefix_repetition: tokens per suffix.")
    prefix_repetition_num_prefixes: int = setting(10, "prefix_repetition: distinct prefixes.")
    prefix_repetition_output_len: int = setting(128, "prefix_repetition: tokens per answer.")
    time_scale: float = setting(
        1.0, "Traces: multiply arrival times; 0.1 replays ten times as fast."
    )
    max_input_len: int | None = setting(None, "Cut longer prompts to this many tokens.")
    max_output_len: int | None = setting(None, "Cut longer answers to this many tokens.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")
        if (self.dataset_name in TRACES) != (self.dataset_path is not None):
            verb = "needs" if self.dataset_name in TRACES else "takes no"
            raise ConfigError(f"dataset {self.dataset_name} {verb} --dataset-path")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThroughputSpec(Spec):
    """Short names of a workload's lengths."""

    input_len: int | None = setting(None, "random: the same as --random-input-len.")
    output_len: int | None = setting(None, "random: the same as --random-output-len.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatencySpec(Spec):
    """One batch, and how often it is run."""

    input_len: int = setting(32, "Tokens per prompt.")
    output_len: int = setting(128, "Tokens per answer.")
    batch_size: int = setting(8, "Prompts in the batch.")
    num_iters_warmup: int = setting(10, "Iterations that are not timed.", range=NOT_NEGATIVE)
    num_iters: int = setting(30, "Iterations that are.")
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeSpec(Spec):
    """A running server, how it is loaded, and what is reported."""

    host: str = setting("127.0.0.1", "The server's host.")
    port: int = setting(50051, "The server's gRPC port.")
    model: str = setting("", "The model to ask for (default: what is served).")
    request_rate: float | None = setting(
        None,
        "Requests per second; inf sends all at once (default: a trace's own times, else inf).",
        range=NO_LIMIT,
    )
    burstiness: float = setting(
        1.0, "Shape of the gamma-distributed gaps: 1 is a Poisson process, less is burstier."
    )
    max_concurrency: int | None = setting(None, "Requests under way at once, at most.")
    seed: int = setting(0, "Seed of prompts and arrivals.", range=SEED)
    temperature: float = setting(0.0, "Of the sampling; 0 is greedy.", range=NOT_NEGATIVE)
    ignore_eos: bool = setting(True, "Generate on past end-of-sequence tokens.")
    num_warmups: int = setting(0, "Requests sent first and not measured.", range=NOT_NEGATIVE)
    ready_check_timeout_sec: float = setting(
        60.0, "How long to wait for the server.", range=NOT_NEGATIVE
    )
    percentile_metrics: tuple[str, ...] = setting(
        ("ttft", "tpot", "itl", "e2el"),
        "Metrics to report.",
        choices=("ttft", "tpot", "itl", "e2el"),
    )
    metric_percentiles: tuple[float, ...] = setting(
        (90.0, 99.0), "Percentiles to report.", range="[0, 100]"
    )
    save_result: bool = setting(False, "Write the results to a JSON file.")
    save_detailed: bool = setting(False, "With every request's figures and text.")
    result_dir: Path | None = setting(None, "Where to (default: the current directory).")
    result_filename: str | None = setting(None, "Its name (default: made up).")

    @property
    def saves(self) -> bool:
        """Whether a file is written."""
        return self.save_result or self.save_detailed
