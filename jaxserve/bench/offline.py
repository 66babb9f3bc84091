"""Benchmarks of the engine alone, without a server: throughput and latency of a batch."""

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from jaxserve.bench.load_settings import LatencySpec
from jaxserve.bench.tables import Result
from jaxserve.bench.workloads import WorkloadItem
from jaxserve.core.errors import JaxserveError
from jaxserve.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.llm import LLM

LATENCY_PERCENTILES = (10, 25, 50, 75, 90, 99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughput(Result):
    """What `vllm bench throughput --output-json` writes, and prompt and output tokens apart."""

    elapsed_time: float
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    total_num_tokens: int
    requests_per_second: float
    tokens_per_second: float
    output_tokens_per_second: float

    def __str__(self) -> str:
        return (
            f"Throughput: {self.requests_per_second:.2f} requests/s, "
            f"{self.tokens_per_second:.2f} total tokens/s, "
            f"{self.output_tokens_per_second:.2f} output tokens/s\n"
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
    prompt = sum(len(item.prompt_token_ids) for item in items)
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    return Throughput(
        elapsed_time=elapsed,
        num_requests=len(items),
        num_prompt_tokens=prompt,
        num_output_tokens=generated,
        total_num_tokens=prompt + generated,
        requests_per_second=len(items) / elapsed,
        tokens_per_second=(prompt + generated) / elapsed,
        output_tokens_per_second=generated / elapsed,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency(Result):
    """What `vllm bench latency --output-json` writes: seconds of each repetition of one batch."""

    avg_latency: float
    std_latency: float
    latencies: list[float]
    percentiles: dict[str, float]

    def __str__(self) -> str:
        lines = [
            f"Avg latency: {self.avg_latency} seconds",
            f"Std latency: {self.std_latency} seconds",
            *(f"{p}% percentile latency: {v} seconds" for p, v in self.percentiles.items()),
        ]
        return "\n".join(lines)


def measure_latency(
    llm: "LLM", items: Sequence[WorkloadItem], spec: LatencySpec, *, progress: bool = True
) -> Latency:
    """Run one batch again and again, each time to its end."""
    prompts, params = _requests(items, temperature=1.0)

    def run() -> float:
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    for _ in tqdm(range(spec.num_iters_warmup), desc="Warmup iterations", disable=not progress):
        run()
    bar = tqdm(range(spec.num_iters), desc="Bench iterations", disable=not progress)
    seconds = np.array([run() for _ in bar])
    return Latency(
        avg_latency=float(seconds.mean()),
        std_latency=float(seconds.std()),
        latencies=seconds.tolist(),
        percentiles={str(p): float(np.percentile(seconds, p)) for p in LATENCY_PERCENTILES},
    )


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
