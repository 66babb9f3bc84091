"""What has been counted since the server started: fed by the engine, read by scrapes."""

import copy
import threading
import time
from collections import Counter

from jaxserve.core.request import FinishReason, Request
from jaxserve.engine.records import RequestRecord, StepRecord, TokenTimes
from jaxserve.server.metrics.histogram import Histogram
from jaxserve.server.metrics.names import (
    ITL_BOUNDS,
    LATENCY_BOUNDS,
    N_BOUNDS,
    PREEMPTION_BOUNDS,
    STEP_SECONDS_BOUNDS,
    STEP_TOKEN_BOUNDS,
    TTFT_BOUNDS,
    token_bounds,
)


class Totals:
    """Counters and histograms over all steps and requests; an `EngineObserver`.

    Histograms of whole requests are of those that ended by themselves, as in vLLM: what was
    aborted says nothing about how long a request takes.

    Args:
        max_model_len: longest request in tokens, for the buckets of token counts.

    Attributes:
        counts: numbers by name.
        finished: requests that ended, by reason.
        histograms: by the metric's name.
        last_ended: when a request ended last, in seconds since 1970; 0 for never.
        token_buckets, row_buckets: steps by what they were padded to.
    """

    def __init__(self, max_model_len: int) -> None:
        tokens = token_bounds(max_model_len)
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.finished: Counter[FinishReason] = Counter()
        self.token_buckets: Counter[int] = Counter()
        self.row_buckets: Counter[int] = Counter()
        self.last_ended = 0.0
        self.histograms = {
            "iteration_tokens_total": Histogram(STEP_TOKEN_BOUNDS),
            "step_time_seconds": Histogram(STEP_SECONDS_BOUNDS),
            "time_to_first_token_seconds": Histogram(TTFT_BOUNDS),
            "inter_token_latency_seconds": Histogram(ITL_BOUNDS),
            "request_time_per_output_token_seconds": Histogram(ITL_BOUNDS),
            "e2e_request_latency_seconds": Histogram(LATENCY_BOUNDS),
            "request_queue_time_seconds": Histogram(LATENCY_BOUNDS),
            "request_prefill_time_seconds": Histogram(LATENCY_BOUNDS),
            "request_decode_time_seconds": Histogram(LATENCY_BOUNDS),
            "request_inference_time_seconds": Histogram(LATENCY_BOUNDS),
            "request_prompt_tokens": Histogram(tokens),
            "request_generation_tokens": Histogram(tokens),
            "request_max_num_generation_tokens": Histogram(tokens),
            "request_params_max_tokens": Histogram(tokens),
            "request_prefill_kv_computed_tokens": Histogram(tokens),
            "request_num_preemptions": Histogram(PREEMPTION_BOUNDS),
            "request_params_n": Histogram(N_BOUNDS),
        }

    def step_done(self, step: StepRecord, times: TokenTimes) -> None:
        """Count a step and its tokens."""
        counts, histograms = self.counts, self.histograms
        with self._lock:
            counts["steps"] += 1
            counts["step_tokens"] += step.num_tokens
            counts["step_padding_tokens"] += step.num_padding_tokens
            counts["step_rows"] += step.num_sampled
            counts["step_padding_rows"] += step.row_bucket - step.num_sampled
            counts["prompt_tokens"] += times.num_prompt_tokens
            counts["prompt_tokens_cached"] += times.num_cached_tokens
            counts["prompt_tokens_fetched"] += times.num_fetched_tokens
            counts["generation_tokens"] += step.num_generated
            self.token_buckets[step.token_bucket] += 1
            if step.row_bucket:
                self.row_buckets[step.row_bucket] += 1
            if processed := step.num_generated + times.num_prompt_tokens - times.num_cached_tokens:
                histograms["iteration_tokens_total"].observe(processed)
            histograms["step_time_seconds"].observe(step.seconds)
            for seconds in times.first_tokens:
                histograms["time_to_first_token_seconds"].observe(seconds)
            for seconds, count in times.gaps.items():
                histograms["inter_token_latency_seconds"].observe(seconds, count)

    def request_done(self, record: RequestRecord, request: Request) -> None:
        """Count a request that ended."""
        with self._lock:
            self.finished[record.finish_reason] += 1
            self.last_ended = time.time()
            if record.finish_reason.is_natural:
                if record.is_answered and record.first_token is None:  # its grammar allowed none
                    self.counts["prompt_tokens"] += record.num_prompt_tokens
                    self.counts["prompt_tokens_cached"] += record.num_cached_tokens
                    self.counts["prompt_tokens_fetched"] += record.num_fetched_tokens
                for name, value in _measures(record).items():
                    if value is not None:
                        self.histograms[name].observe(value)

    def prompt_answered(self, n: int, num_tokens: int) -> None:
        """Count a prompt with its `n` answers, the longest of which has so many tokens."""
        with self._lock:
            self.histograms["request_params_n"].observe(n)
            self.histograms["request_max_num_generation_tokens"].observe(num_tokens)

    def count(self, name: str) -> None:
        """Count one more of what `counts` has by this name."""
        with self._lock:
            self.counts[name] += 1

    def snapshot(self) -> "Totals":
        """A copy of one moment."""
        with self._lock:
            other = copy.copy(self)
            other.counts, other.finished = self.counts.copy(), self.finished.copy()
            other.token_buckets = self.token_buckets.copy()
            other.row_buckets = self.row_buckets.copy()
            other.histograms = {name: h.copy() for name, h in self.histograms.items()}
            return other


def _measures(record: RequestRecord) -> dict[str, float | None]:
    """What each histogram of whole requests gets of one; None: nothing."""
    return {
        "request_time_per_output_token_seconds": record.seconds_per_output_token,
        "e2e_request_latency_seconds": record.e2e_seconds,
        "request_queue_time_seconds": record.queue_seconds,
        "request_prefill_time_seconds": record.prefill_seconds,
        "request_decode_time_seconds": record.decode_seconds,
        "request_inference_time_seconds": record.inference_seconds,
        "request_prompt_tokens": record.num_prompt_tokens,
        "request_generation_tokens": record.num_output_tokens,
        "request_params_max_tokens": record.max_tokens if record.is_answered else None,
        "request_prefill_kv_computed_tokens": record.num_prompt_tokens - record.num_cached_tokens,
        "request_num_preemptions": record.num_preemptions,
    }
