"""The engine's options: one dataclass, from which flags, help texts and the README table come."""

import dataclasses
from typing import Any

from jaxserve.core.errors import ConfigError


def option(default: Any, help: str, *, group: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that is also a command-line flag."""
    metadata = {"help": help, "group": group, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of one engine. A field `max_num_seqs` is the flag `--max-num-seqs`.

    Raises:
        ConfigError: a value is out of range or two options contradict each other.
    """

    # Model
    model: str = option(
        "smollm2-135m",
        "a pulled model's name, a checkpoint directory or GGUF file, a hub name, or, with "
        "--random-weights, a preset",
        group="model",
    )
    tokenizer: str | None = option(
        None, "tokenizer file or directory, if not the one beside the checkpoint", group="model"
    )
    served_model_name: str | None = option(
        None, "the name that clients ask for (default: the model's)", group="model"
    )
    random_weights: bool = option(
        False, "run a preset's architecture with random weights, no checkpoint", group="model"
    )
    dtype: str = option(
        "auto",
        "type of weights and activations; auto is bfloat16, on CPU float32",
        group="model",
        choices=("auto", "float32", "bfloat16"),
    )
    max_model_len: int | None = option(
        None, "longest prompt plus answer, in tokens (default: the model's, at most 8192)",
        group="model",
    )  # fmt: skip
    seed: int = option(0, "seed of random weights and of requests that bring none", group="model")

    # Device
    mesh: str = option(
        "data=1,tensor=1", "device mesh: batch shards and tensor-parallel shards", group="device"
    )
    attention_implementation: str = option(
        "auto",
        "the paged attention to use; a named one never falls back to another",
        group="device",
        choices=("auto", "tpu", "gpu", "xla", "reference"),
    )
    compilation_cache_dir: str | None = option(
        None, "where compiled programs are kept (default: ~/.cache/jaxserve/programs)",
        group="device",
    )  # fmt: skip
    strict_compile: bool = option(
        False, "raise on a compile after READY instead of counting it", group="device"
    )

    # KV cache
    page_size: int = option(64, "tokens per KV page", group="cache")
    num_pages: int | None = option(
        None, "KV pages over all data shards (default: from --kv-cache-memory)", group="cache"
    )
    kv_cache_memory: float | None = option(
        None, "GiB of KV cache per device (default: what is free on an accelerator, on CPU 2)",
        group="cache",
    )  # fmt: skip

    # Scheduling
    max_num_seqs: int = option(
        64, "requests that run at the same time, at most", group="scheduling"
    )
    max_num_batched_tokens: int = option(
        512, "token budget of one step, prefill chunks and decodes together", group="scheduling"
    )
    max_waiting: int = option(
        2048, "requests that may wait; more are refused as queue full", group="scheduling"
    )
    policy: str = option("fcfs", "order in which requests are served", group="scheduling",
                         choices=("fcfs",))  # fmt: skip
    overlap: bool = option(
        True, "launch the next step before the last one is collected", group="scheduling"
    )

    def __post_init__(self) -> None:
        for field in ("page_size", "max_num_seqs", "max_num_batched_tokens", "max_waiting"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("num_pages", "kv_cache_memory", "max_model_len"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise ConfigError(f"{field} must be positive, got {value}")
        for field in dataclasses.fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value not in choices:
                raise ConfigError(f"{field.name} must be one of {', '.join(choices)}, got {value}")
        if self.page_size & (self.page_size - 1):
            raise ConfigError(f"page_size must be a power of two, got {self.page_size}")
