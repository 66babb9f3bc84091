"""A whole engine without a device: real scheduler, pages and tokenizer, a hash for a model."""

from typing import Any

from jaxserve.cache.events import EventLog
from jaxserve.core.config import EngineConfig
from jaxserve.core.sampling_defaults import SamplingDefaults
from jaxserve.core.step import Executor
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.engine import Engine
from jaxserve.engine.outputs import ModelInfo
from jaxserve.engine.profiling import Profiler
from jaxserve.prediction.base import LengthPredictor
from jaxserve.runner.buckets import doubling_buckets
from jaxserve.scheduling.build import build_scheduler
from jaxserve.scheduling.page_traffic import Store
from jaxserve.scheduling.policies import Policy
from jaxserve.testing.fake_executor import FakeExecutor, FakeModel
from jaxserve.tokenizers.byte_tokenizer import ByteTokenizer

_SMALL: dict[str, Any] = dict(
    num_pages=512, page_size=4, max_model_len=512, max_num_seqs=16, max_num_batched_tokens=128,
    max_waiting=1000,
)  # fmt: skip


def fake_engine(**options: Any) -> AsyncEngine:
    """An engine that is ready at once; for testing clients and servers.

    Args:
        options: those of `fake_sync_engine`.
    """
    return AsyncEngine(fake_sync_engine(**options))


def fake_sync_engine(
    config: EngineConfig | None = None,
    *,
    model: FakeModel | None = None,
    executor: Executor | None = None,
    store: Store | None = None,
    policy: Policy | None = None,
    predictor: LengthPredictor | None = None,
    step_seconds: float = 0.001,
    profiler: Profiler | None = None,
    default_sampling_params: SamplingDefaults | None = None,
    **options: Any,
) -> Engine:
    """An engine without a device that its caller steps; for testing policies.

    Args:
        config: the engine's options, with `num_pages` and `max_model_len`; default small ones.
        model: what answers; default one over the byte tokenizer's vocabulary.
        executor: the device; default a `FakeExecutor` of `model`.
        store: host memory and disk below the device, which the executor must know, too.
        policy: the order of service, if not the one that the options name.
        predictor: of answers' lengths, if any.
        step_seconds: how long the pretended device takes for a step.
        profiler: what takes profiles, if anything.
        default_sampling_params: of requests that do not say.
        options: single ones, as in `EngineConfig`, if there is no `config`.
    """
    config = config or EngineConfig(**(_SMALL | options))
    assert config.num_pages is not None and config.max_model_len is not None
    tokenizer = ByteTokenizer()
    events = EventLog()
    model = model or FakeModel(vocab_size=tokenizer.vocab_size)
    scheduler = build_scheduler(
        config,
        step_sizes=doubling_buckets(config.max_num_batched_tokens),
        store=store,
        events=events,
        policy=policy,
        probe_every=predictor.probe_every if predictor else 0,
    )
    info = ModelInfo(
        name="fake",
        family="hash",
        max_model_len=config.max_model_len,
        vocab_size=max(model.vocab_size, tokenizer.vocab_size),
        num_layers=1,
        dtype="int32",
        kv_cache_dtype="none",
        mesh="data=1,tensor=1",
        attention_implementation="none",
        linear_implementation="none",
        page_size=config.page_size,
        num_pages=config.num_pages,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        platform="fake",
        eos_token_ids=tokenizer.eos_token_ids,
        default_sampling_params=default_sampling_params or {},
    )
    if executor is None:
        executor = FakeExecutor(page_size=config.page_size, model=model, step_seconds=step_seconds)
    return Engine(
        scheduler,
        executor,
        tokenizer,
        info,
        predictor=predictor,
        profiler=profiler,
        overlap=config.overlap,
        embedding_pooling=config.embedding_pooling,
        events=events,
    )
