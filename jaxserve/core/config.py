"""The engine's options: one dataclass, from which flags, help texts and the README table come."""

import dataclasses

from jaxserve.core.errors import ConfigError
from jaxserve.core.options import (
    AT_LEAST_ONE,
    GIB,
    MILLISECONDS,
    NO_LIMIT,
    POSITIVE,
    SEED,
    check_options,
    option,
)


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
    chat_special_tokens: bool = option(
        False, "let callers' texts in chats spell out control tokens, such as <|im_end|>, which "
        "are text otherwise", group="model",
    )  # fmt: skip
    served_model_name: str | None = option(
        None, "the name that clients ask for (default: the model's)", group="model"
    )
    random_weights: bool = option(
        False, "run a preset's architecture with random weights, no checkpoint", group="model"
    )
    allow_unknown_config: bool = option(
        False, "go on with keys of config.json or GGUF metadata that jaxserve does not know and "
        "that may change what the model computes", group="model",
    )  # fmt: skip
    generation_config: str = option(
        "auto", "sampling defaults of requests that do not say: auto takes the model's own, none "
        "takes none, else a generation_config.json or its directory", group="model",
    )  # fmt: skip
    dtype: str = option(
        "auto",
        "type of weights and activations; auto is bfloat16, on CPU float32",
        group="model",
        choices=("auto", "float32", "bfloat16"),
    )
    quantization: str = option(
        "auto",
        "how weights are held: auto as the checkpoint has them, where a kernel multiplies them so, "
        "and in --dtype elsewhere; none in --dtype; int8 and fp8 with a scale for each output, "
        "int4 with one for every 32 inputs (embedding and head in int8)",
        group="model",
        choices=("auto", "none", "int8", "int4", "fp8"),
    )
    activation_dtype: str = option(
        "auto",
        "what quantised weights multiply: activations as they are (auto, float), or each token's "
        "rounded to int8, which is faster and less exact",
        group="model",
        choices=("auto", "float", "int8"),
    )
    max_model_len: int | None = option(
        None, "longest prompt plus answer, in tokens (default: the model's, at most 8192)",
        range=POSITIVE, group="model",
    )  # fmt: skip
    seed: int = option(
        0, "seed of random weights and of requests that bring none", range=SEED, group="model"
    )
    embedding_pooling: str = option(
        "mean", "what becomes a text's embedding: the mean of its tokens' last hidden states, or "
        "the last token's", group="model", choices=("mean", "last"),
    )  # fmt: skip
    json_whitespace: str = option(
        "little", "what an answer of a JSON form may have between its parts: a blank or an "
        "indented line, nothing, or up to 40 blanks", group="model",
        choices=("little", "compact", "any"),
    )  # fmt: skip

    # Device
    mesh: str = option(
        "data=1,tensor=1", "device mesh: batch shards and tensor-parallel shards", group="device"
    )
    attention_implementation: str = option(
        "auto",
        "the paged attention to use; a named one never falls back to another",
        group="device",
        choices=("auto", "tpu", "gpu", "cpu", "xla", "reference"),
    )
    linear_implementation: str = option(
        "auto",
        "the products with weights to use; a named one never falls back to another; cpu leaves "
        "those of more than 192 tokens to XLA",
        group="device",
        choices=("auto", "cpu", "xla", "reference"),
    )
    num_spans: int | None = option(
        None,
        "spans that the layers are cut into, each a program with its own weights; equal spans "
        "share one, so that large models compile sooner, and each span costs the host a launch "
        "(default: one; on accelerators more for large models, of 8 layers or more)",
        range="[1, 1024]",
        group="device",
    )
    compilation_cache_dir: str | None = option(
        None, "where compiled programs are kept (default: ~/.cache/jaxserve/programs)",
        group="device",
    )  # fmt: skip
    ready: str = option(
        "all", "when requests are taken: once all programs are there, or first those of the "
        "largest buckets, to which steps are padded until the rest is compiled beside them",
        group="device", choices=("all", "first"),
    )  # fmt: skip
    strict_compile: bool = option(
        False, "raise on a compile after READY instead of counting it", group="device"
    )

    # KV cache
    kv_cache_dtype: str = option(
        "auto",
        "type of the KV cache; auto is --dtype's; on a CPU, bfloat16 beside float32 weights holds "
        "twice the tokens in as many bytes; int8 and fp8 have a scale per token and head",
        group="cache",
        choices=("auto", "float32", "bfloat16", "int8", "fp8"),
    )
    page_size: int = option(64, "tokens per KV page", range="[1, 65536]", group="cache")
    num_pages: int | None = option(
        None,
        "KV pages over all data shards (default: from --kv-cache-memory)",
        range=POSITIVE,
        group="cache",
    )
    kv_cache_memory: float | None = option(
        None, "GiB of KV cache per device (default: what is free on an accelerator, on CPU 2)",
        range="(0, 1048576]", group="cache",
    )  # fmt: skip
    prefix_cache: bool = option(
        True, "share KV pages between requests that begin with the same tokens", group="cache"
    )
    host_cache_memory: float = option(
        0.0,
        "GiB of host memory for KV pages that the device has no room for",
        range=GIB,
        group="cache",
    )
    disk_cache_memory: float = option(
        0.0, "GiB of disk for KV pages that host memory has no room for; they outlive a restart",
        range=GIB, group="cache",
    )  # fmt: skip
    disk_cache_dir: str | None = option(
        None, "where those are kept (default: ~/.cache/jaxserve/kv)", group="cache"
    )

    # Scheduling
    max_num_seqs: int = option(
        64, "requests that run at the same time, at most", range="[1, 65536]", group="scheduling"
    )
    max_num_batched_tokens: int = option(
        512,
        "token budget of one step, prefill chunks and decodes together",
        range="[1, 1048576]",
        group="scheduling",
    )
    max_waiting: int = option(
        2048,
        "requests that may wait; more are refused as queue full",
        range=AT_LEAST_ONE,
        group="scheduling",
    )
    policy: str = option(
        "fcfs", "order in which requests are served", group="scheduling",
        choices=("fcfs", "priority", "sjf", "srtf", "mlfq", "deadline", "ltr", "vtc", "lpm",
                 "batch-prefix"),
    )  # fmt: skip
    starvation_timeout: float = option(
        60.0, "seconds without progress after which a request goes before all others, by arrival "
        "(not under fcfs, vtc and batch-prefix, where nobody starves)", range=NO_LIMIT,
        group="scheduling",
    )  # fmt: skip
    length_predictor: str = option(
        "none", "what foretells the lengths of answers: exact (regression), range (classes), "
        "rank (pairwise ranking) learn while serving; oracle takes max_tokens for the truth",
        group="scheduling", choices=("none", "exact", "range", "rank", "oracle"),
    )  # fmt: skip
    predictor_dir: str | None = option(
        None, "where it keeps what it learned (default: ~/.cache/jaxserve/predictors)",
        group="scheduling",
    )  # fmt: skip
    admission: str = option(
        "current", "KV pages that a request must find free to start: for its tokens so far, for "
        "its predicted length too, or for max_tokens", group="scheduling",
        choices=("current", "predicted", "max"),
    )  # fmt: skip
    preemption: str = option(
        "auto", "what becomes of a preempted request's KV: recomputed, swapped to host memory "
        "(needs --host-cache-memory), or what is estimated to cost less", group="scheduling",
        choices=("auto", "recompute", "swap"),
    )  # fmt: skip
    token_budget: str = option(
        "fixed", "tokens per step: max_num_batched_tokens, or only as many as keep a step within "
        "--slo-tpot-ms", group="scheduling", choices=("fixed", "tpot"),
    )  # fmt: skip
    slo_ttft_ms: float = option(
        10_000.0,
        "time to first token wanted by requests that do not say",
        range=MILLISECONDS,
        group="scheduling",
    )
    slo_tpot_ms: float = option(
        1_000.0,
        "time per output token wanted by requests that do not say",
        range=MILLISECONDS,
        group="scheduling",
    )
    shed_overdue: bool = option(
        False, "refuse waiting requests that cannot meet their targets any more (policy deadline)",
        group="scheduling",
    )  # fmt: skip
    tenant_weights: str = option(
        "", "shares of tenants under policy vtc, for example gold=2,free=0.5 (others: 1)",
        group="scheduling",
    )  # fmt: skip
    prefill_first: bool = option(
        False, "no decoding while a prompt can be computed, instead of chunked prefill beside it",
        group="scheduling",
    )  # fmt: skip
    slice_tokens: int | None = option(
        None, "after so many answer tokens a request makes room for those that wait",
        range=POSITIVE, group="scheduling",
    )  # fmt: skip
    token_buckets: str | None = option(
        None, "token counts that steps are padded to, for example 1,8,24,64 (default: doubling; "
        "see jaxserve bench buckets)", group="scheduling",
    )  # fmt: skip
    row_buckets: str | None = option(
        None, "row counts that the sampler's steps are padded to, likewise", group="scheduling"
    )
    overlap: bool = option(
        True, "launch the next step before the last one is collected", group="scheduling"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.page_size & (self.page_size - 1):
            raise ConfigError(f"page_size must be a power of two, got {self.page_size}")
        self._check_together()

    def _check_together(self) -> None:
        parse_tenant_weights(self.tenant_weights)
        if self.tenant_weights and self.policy != "vtc":
            raise ConfigError("tenant_weights are for policy vtc")
        if self.shed_overdue and self.policy != "deadline":
            raise ConfigError("shed_overdue is for policy deadline")
        if self.admission == "predicted" and self.length_predictor == "none":
            raise ConfigError("admission by predicted lengths needs a length_predictor")
        if self.preemption == "swap" and not self.host_cache_memory:
            raise ConfigError("preemption by swapping needs host_cache_memory")
        if self.policy in ("lpm", "batch-prefix") and not self.prefix_cache:
            raise ConfigError(
                f"policy {self.policy} goes by shared prefixes: it needs prefix_cache"
            )


def parse_tenant_weights(text: str) -> dict[str, float]:
    """The weights of tenants in `gold=2,free=0.5`.

    Raises:
        ConfigError: it is not such a list, or a weight is not a positive number.
    """
    weights: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        tenant, _, weight = part.rpartition("=")
        try:
            weights[tenant] = float(weight)
        except ValueError:
            weights[tenant] = 0.0
        if not tenant or not 0 < weights[tenant] < float("inf"):
            raise ConfigError(f"tenant_weights must be like gold=2,free=0.5, got {text!r}")
    return weights
