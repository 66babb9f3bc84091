"""What a load run measured, in the words and numbers of `vllm bench serve`.

Definitions, per successful request:

* TTFT: from sending it to the first token.
* E2EL: from sending it to the last token.
* TPOT: (E2EL - TTFT) / (tokens - 1), for answers of at least two tokens.
* ITL: the gap before each token but the first; a message of k tokens that comes g seconds
  after the one before counts as k gaps of g / k. So a request's ITLs sum to E2EL - TTFT.
"""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.bench.load import LoadResult, RequestRecord
from jaxserve.core.errors import ConfigError

METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
WIDTH = 50


@dataclasses.dataclass(frozen=True)
class Latencies:
    """Seconds: one TTFT, E2EL per request, one TPOT per answer of two tokens, all ITLs."""

    ttft: np.ndarray
    tpot: np.ndarray
    itl: np.ndarray
    e2el: np.ndarray


def inter_token_latencies(record: RequestRecord) -> np.ndarray:
    """Gap before each token but the first, in seconds, float64 [output_len - 1]."""
    tokens = np.array(record.delta_tokens, int)
    gaps = np.diff(record.delta_times, prepend=record.delta_times[:1])
    return np.repeat(gaps / tokens, tokens)[1:]


def latencies(records: Sequence[RequestRecord]) -> Latencies:
    """The latencies of successful requests that produced a token."""
    records = [r for r in records if r.error is None and r.delta_times]
    ttft = np.array([r.delta_times[0] - r.start for r in records])
    e2el = np.array([r.delta_times[-1] - r.start for r in records])
    lens = np.array([r.output_len for r in records])
    several = lens > 1
    tpot = (e2el - ttft)[several] / (lens[several] - 1)
    itl = np.concatenate([np.empty(0), *(inter_token_latencies(r) for r in records)])
    return Latencies(ttft, tpot, itl, e2el)


def summarize(
    result: LoadResult,
    *,
    metrics: Sequence[str] = tuple(METRICS),
    percentiles: Sequence[float] = (90, 99),
) -> dict[str, Any]:
    """All figures of a run, under vLLM's names (`mean_ttft_ms`, `p99_itl_ms`, ...).

    Args:
        result: the run.
        metrics: which of ttft, tpot, itl, e2el.
        percentiles: in [0, 100].

    Raises:
        ConfigError: an unknown metric, or a percentile out of range.
    """
    if unknown := set(metrics) - set(METRICS):
        raise ConfigError(f"unknown metrics {sorted(unknown)}; there are {', '.join(METRICS)}")
    if any(not 0 <= p <= 100 for p in percentiles):
        raise ConfigError(f"percentiles must be in [0, 100], got {list(percentiles)}")
    good = [record for record in result.records if record.error is None]
    inputs, outputs = sum(r.prompt_len for r in good), sum(r.output_len for r in good)
    peak_tokens, peak_requests = _peaks(good)
    summary: dict[str, Any] = {
        "duration": result.duration,
        "completed": len(good),
        "failed": len(result.records) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / result.duration,
        "output_throughput": outputs / result.duration,
        "total_token_throughput": (inputs + outputs) / result.duration,
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
    }
    times = latencies(good)
    for metric in metrics:
        seconds = getattr(times, metric)
        values = seconds * 1000 if len(seconds) else np.zeros(1)
        summary[f"mean_{metric}_ms"] = float(values.mean())
        summary[f"median_{metric}_ms"] = float(np.median(values))
        summary[f"std_{metric}_ms"] = float(values.std())
        for p in percentiles:
            summary[f"p{p:g}_{metric}_ms"] = float(np.percentile(values, p))
    return summary


def _peaks(records: Sequence[RequestRecord]) -> tuple[float, int]:
    """Most tokens received in one second of the run, and most requests at one time."""
    records = [record for record in records if record.delta_times]
    if not records:
        return 0.0, 0
    times = np.concatenate([record.delta_times for record in records])
    tokens = np.concatenate([record.delta_tokens for record in records])
    first = min(record.start for record in records)
    per_second = np.bincount((times - first).astype(int), weights=tokens)
    # An end at the very time of a start comes first: the two did not overlap.
    events = [(r.start, 1) for r in records] + [(r.delta_times[-1], -1) for r in records]
    running = np.cumsum([change for _, change in sorted(events)])
    return float(per_second.max()), int(running.max())


def format_report(
    summary: dict[str, Any],
    *,
    metrics: Sequence[str] = tuple(METRICS),
    percentiles: Sequence[float] = (90, 99),
    request_rate: float | None = None,
    max_concurrency: int | None = None,
) -> str:
    """The table that `vllm bench serve` prints."""
    lines = [" Serving Benchmark Result ".center(WIDTH, "=")]

    def row(label: str, value: float) -> None:
        text = f"{value:<10}" if isinstance(value, int) else f"{value:<10.2f}"
        lines.append(f"{label:<40} {text}".rstrip())

    row("Successful requests:", summary["completed"])
    row("Failed requests:", summary["failed"])
    if max_concurrency is not None:
        row("Maximum request concurrency:", max_concurrency)
    if request_rate is not None and np.isfinite(request_rate):
        row("Request rate configured (RPS):", float(request_rate))
    row("Benchmark duration (s):", summary["duration"])
    row("Total input tokens:", summary["total_input_tokens"])
    row("Total generated tokens:", summary["total_output_tokens"])
    row("Request throughput (req/s):", summary["request_throughput"])
    row("Output token throughput (tok/s):", summary["output_throughput"])
    row("Peak output token throughput (tok/s):", summary["max_output_tokens_per_s"])
    row("Peak concurrent requests:", summary["max_concurrent_requests"])
    row("Total token throughput (tok/s):", summary["total_token_throughput"])
    for metric in metrics:
        name, title = METRICS[metric]
        lines.append(title.center(WIDTH, "-"))
        row(f"Mean {name} (ms):", summary[f"mean_{metric}_ms"])
        row(f"Median {name} (ms):", summary[f"median_{metric}_ms"])
        for p in percentiles:
            row(f"P{p:g} {name} (ms):", summary[f"p{p:g}_{metric}_ms"])
    lines.append("=" * WIDTH)
    return "\n".join(lines)


def detailed(result: LoadResult) -> dict[str, list[Any]]:
    """Per-request fields of a saved result, failed requests included."""
    records = result.records
    return {
        "input_lens": [r.prompt_len for r in records],
        "output_lens": [r.output_len for r in records],
        "start_times": [r.start for r in records],
        "ttfts": [r.delta_times[0] - r.start if r.delta_times else 0.0 for r in records],
        "itls": [inter_token_latencies(r).tolist() for r in records],
        "generated_texts": [r.text for r in records],
        "errors": [r.error or "" for r in records],
    }


def save_result(
    fields: dict[str, Any], *, directory: Path | None, filename: str | None, now: datetime.datetime
) -> Path:
    """Write a result as JSON and return where.

    Args:
        fields: what to write; `request_rate`, `max_concurrency` and `model_id` also make up
            the file's name when none is given.
        directory: made if missing; default the current one.
        filename: default `jaxserve-<rate>qps[-concurrency<n>]-<model>-<date>.json`.
        now: the date to note.
    """
    date = now.strftime("%Y%m%d-%H%M%S")
    if filename is None:
        limit = fields.get("max_concurrency")
        concurrency = f"-concurrency{limit}" if limit else ""
        model = str(fields.get("model_id", "")).replace("/", "_")
        filename = f"jaxserve-{fields.get('request_rate')}qps{concurrency}-{model}-{date}.json"
    path = (directory or Path()) / filename
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"date": date, **fields}) + "\n", encoding="utf-8")
    return path
