"""What the metrics are called, and the bounds of the histograms' buckets.

A metric that vLLM has as well means the same here, has the same name after the colon and the same
buckets (vllm/v1/metrics of vLLM 0.32), so that dashboards and gateways made for one serve for both.
"""

from collections.abc import Iterable

COMPAT_CHOICES = ("none", "vllm")

_VLLM_NAMES = frozenset({
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info",
    "prefix_cache_queries", "prefix_cache_hits", "external_prefix_cache_queries",
    "external_prefix_cache_hits", "num_preemptions", "prompt_tokens", "prompt_tokens_by_source",
    "prompt_tokens_cached", "generation_tokens", "request_success", "iteration_tokens_total",
    "time_to_first_token_seconds", "inter_token_latency_seconds",
    "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
    "request_inference_time_seconds", "request_prompt_tokens", "request_generation_tokens",
    "request_max_num_generation_tokens", "request_params_max_tokens", "request_params_n",
    "request_num_preemptions", "request_prefill_kv_computed_tokens",
    # Deprecated in vLLM; boards still ask for them.
    "gpu_cache_usage_perc", "time_per_output_token_seconds",
})  # fmt: skip

TTFT_BOUNDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BOUNDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
LATENCY_BOUNDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
STEP_TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
STEP_SECONDS_BOUNDS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0,
)  # fmt: skip
N_BOUNDS = (1, 2, 5, 10, 20)
PREEMPTION_BOUNDS = (1, 2, 3, 4, 5, 10, 20)


def token_bounds(largest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `largest`."""
    bounds: list[int] = []
    power = 1
    while power <= largest:
        bounds += [step * power for step in (1, 2, 5) if step * power <= largest]
        power *= 10
    return tuple(bounds)


class MetricNames:
    """Whole names from those after the colon.

    Args:
        compat: "vllm" puts those that vLLM has under `vllm:`; all others are `jaxserve:`.
    """

    def __init__(self, compat: str = "none") -> None:
        self._compat = compat

    @property
    def with_deprecated(self) -> bool:
        """Whether to serve what vLLM has given up but boards still ask for."""
        return self._compat == "vllm"

    def __call__(self, name: str) -> str:
        """The whole name, without the suffixes of samples."""
        is_theirs = self._compat == "vllm" and name in _VLLM_NAMES
        return f"vllm:{name}" if is_theirs else f"jaxserve:{name}"

    @staticmethod
    def shared() -> Iterable[str]:
        """The names, after the colon, that vLLM has too."""
        return sorted(_VLLM_NAMES)
