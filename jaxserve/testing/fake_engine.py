"""A whole engine without a device: real scheduler, pages and tokenizer, a hash for a model."""

from typing import Any

from jaxserve.cache.events import EventLog
from jaxserve.cache.page_pool import PagePool
from jaxserve.core.sampling_defaults import SamplingDefaults
from jaxserve.core.step import Executor
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.engine import Engine
from jaxserve.engine.outputs import ModelInfo
from jaxserve.engine.profiling import Profiler
from jaxserve.scheduling.policies import Policy, make_policy
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.testing.fake_executor import FakeExecutor, FakeModel
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer


def fake_engine(**options: Any) -> AsyncEngine:
    """An engine that is ready at once; for testing clients and servers.

    Args:
        options: those of `fake_sync_engine`.
    """
    return AsyncEngine(fake_sync_engine(**options))


def fake_sync_engine(
    *,
    model: FakeModel | None = None,
    executor: Executor | None = None,
    num_pages: int = 512,
    page_size: int = 4,
    max_model_len: int = 512,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 128,
    max_waiting: int = 1000,
    policy: Policy | None = None,
    overlap: bool = True,
    step_seconds: float = 0.001,
    profiler: Profiler | None = None,
    embedding_pooling: str = "mean",
    default_sampling_params: SamplingDefaults | None = None,
) -> Engine:
    """The same, stepped by its caller; for testing policies.

    Args:
        model: what answers; default one over the byte tokenizer's vocabulary.
        executor: the device; default a `FakeExecutor` of `model`.
        num_pages, page_size: the KV cache's size, and a page's in tokens.
        max_model_len, max_num_seqs, max_num_batched_tokens, max_waiting, overlap,
            embedding_pooling: as in `EngineConfig`.
        policy: the order of service, `fcfs` by default.
        step_seconds: how long the pretended device takes for a step.
        profiler: what takes profiles, if anything.
        default_sampling_params: of requests that do not say.
    """
    tokenizer = ByteTokenizer()
    events = EventLog()
    model = model or FakeModel(vocab_size=tokenizer.vocab_size)
    scheduler = Scheduler(
        page_pools=[PagePool(num_pages, events=events)],
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        max_waiting=max_waiting,
        policy=policy or make_policy("fcfs"),
    )
    info = ModelInfo(
        name="fake",
        family="hash",
        max_model_len=max_model_len,
        vocab_size=max(model.vocab_size, tokenizer.vocab_size),
        num_layers=1,
        dtype="int32",
        kv_cache_dtype="none",
        mesh="data=1,tensor=1",
        attention_implementation="none",
        linear_implementation="none",
        page_size=page_size,
        num_pages=num_pages,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        platform="fake",
        eos_token_ids=tokenizer.eos_token_ids,
        default_sampling_params=default_sampling_params or {},
    )
    if executor is None:
        executor = FakeExecutor(page_size=page_size, model=model, step_seconds=step_seconds)
    return Engine(
        scheduler,
        executor,
        tokenizer,
        info,
        profiler=profiler,
        overlap=overlap,
        embedding_pooling=embedding_pooling,
        events=events,
    )
