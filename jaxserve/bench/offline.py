"""Benchmarks of the engine alone, without a server: throughput and latency of a batch."""

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from jaxserve.bench.workloads import WorkloadItem
from jaxserve.core.errors import ConfigError, JaxserveError
from jaxserve.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.llm import LLM

LATENCY_PERCENTILES = (10, 25, 50, 75, 90, 99)


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Seconds for a whole workload, its requests, and its tokens in and out."""

    elapsed_time: float
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The fields that `vllm bench throughput --output-json` writes."""
        total = self.num_prompt_tokens + self.num_output_tokens
        return {
            "elapsed_time": self.elapsed_time,
            "num_requests": self.num_requests,
            "total_num_tokens": total,
            "requests_per_second": self.num_requests / self.elapsed_time,
            "tokens_per_second": total / self.elapsed_time,
            "output_tokens_per_second": self.num_output_tokens / self.elapsed_time,
        }

    def __str__(self) -> str:
        values = self.to_dict()
        return (
            f"Throughput: {values['requests_per_second']:.2f} requests/s, "
            f"{values['tokens_per_second']:.2f} total tokens/s, "
            f"{values['output_tokens_per_second']:.2f} output tokens/s\n"
            f"Total num prompt tokens:  {self.num_prompt_tokens}\n"
            f"Total num output tokens:  {self.num_output_tokens}"
        )


def measure_throughput(
    llm: "LLM", items: Sequence[WorkloadItem], *, temperature: float = 0.0, progress: bool = True
) -> Throughput:
    """Give the engine all items at once, EOS ignored, and time it to the last token."""
    prompts, params = _requests(items, temperature)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=progress)
    elapsed = time.perf_counter() - start
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    return Throughput(
        elapsed, len(items), sum(len(i.prompt_token_ids) for i in items), generated
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds of each repetition of one batch, float64 [iterations]."""

    latencies: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """The fields that `vllm bench latency --output-json` writes."""
        return {
            "avg_latency": float(self.latencies.mean()),
            "std_latency": float(self.latencies.std()),
            "latencies": self.latencies.tolist(),
            "percentiles": {
                str(p): float(np.percentile(self.latencies, p)) for p in LATENCY_PERCENTILES
            },
        }

    def __str__(self) -> str:
        values = self.to_dict()
        lines = [
            f"Avg latency: {values['avg_latency']} seconds",
            f"Std latency: {values['std_latency']} seconds",
            *(f"{p}% percentile latency: {v} seconds" for p, v in values["percentiles"].items()),
        ]
        return "\n".join(lines)


def measure_latency(
    llm: "LLM",
    items: Sequence[WorkloadItem],
    *,
    num_iters: int,
    num_iters_warmup: int,
    progress: bool = True,
) -> Latency:
    """Run one batch again and again, each time to its end.

    Raises:
        ConfigError: no iterations.
    """
    if num_iters < 1 or num_iters_warmup < 0:
        raise ConfigError("num_iters must be at least 1, num_iters_warmup at least 0")
    prompts, params = _requests(items, temperature=1.0)

    def run() -> float:
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    for _ in tqdm(range(num_iters_warmup), desc="Warmup iterations", disable=not progress):
        run()
    bar = tqdm(range(num_iters), desc="Bench iterations", disable=not progress)
    return Latency(np.array([run() for _ in bar]))


def _requests(
    items: Sequence[WorkloadItem], temperature: float
) -> tuple[list[dict[str, list[int]]], list[SamplingParams]]:
    prompts = [{"prompt_token_ids": item.prompt_token_ids.tolist()} for item in items]
    params = [
        SamplingParams(temperature=temperature, max_tokens=item.output_len, ignore_eos=True)
        for item in items
    ]
    return prompts, params


def require_room(items: Sequence[WorkloadItem], max_model_len: int) -> None:
    """Refuse a workload with a request that the model's context cannot hold.

    Raises:
        JaxserveError: it names the longest request.
    """
    longest = max(len(item.prompt_token_ids) + item.output_len for item in items)
    if longest > max_model_len:
        raise JaxserveError(
            f"the longest request has {longest} tokens in and out, the model takes "
            f"{max_model_len}: see --max-input-len, --max-output-len and --max-model-len"
        )
