"""The engine loop's body: the only place where scheduler and executor meet."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxserve.cache.events import EventLog
from jaxserve.cache.page_store import PageStore
from jaxserve.core.at_exit import close_at_exit
from jaxserve.core.errors import InvalidRequest, JaxserveError
from jaxserve.core.plain_values import integers
from jaxserve.core.request import FinishReason, Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.core.step import Executor, StepPlan
from jaxserve.core.step_histogram import StepHistogram
from jaxserve.engine.grammars import MaskFiller
from jaxserve.engine.late_sampling import late_extras
from jaxserve.engine.lifeline import Lifeline
from jaxserve.engine.outputs import EngineLoad, KvMap, ModelInfo, TokenDelta
from jaxserve.engine.profiling import ProfileCapture, Profiler
from jaxserve.engine.prompt_states import PromptPooler, PromptScorer
from jaxserve.engine.records import EngineRecords
from jaxserve.engine.sampling_rules import RuleMaker, SamplingRules
from jaxserve.engine.stream import EmbeddingStream, OutputStream, RequestStream
from jaxserve.prediction.base import LengthPredictor, NoPredictor
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.compile_counter import CompileCounter
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.tokenizers.base import Tokenizer

# Without an answer, a request computes its prompt and no more.
_EMBEDDING = SamplingParams(temperature=0.0, max_tokens=0, seed=0, prompt_logprobs=0)


class _Launched(NamedTuple):
    """A step on the device, and when it was sent there (seconds, `time.perf_counter`).

    `sizes` are the tokens and the rows that sample of its fullest data shard.
    """

    plan: StepPlan
    handle: Any
    at: float
    sizes: tuple[int, int]


class Engine:
    """Serves requests step by step, on the caller's thread.

    One `step` is the straight line: plan, launch, collect the step before (or, without
    overlap, this one), turn tokens into text and verdicts, commit. With overlap the device
    always has the next step queued while the host works on the last one's tokens.

    After a step that fails the engine is dead: it has no work, and takes none (EngineDead). One
    that is not closed before is closed when the interpreter ends.

    Args:
        scheduler: decides what each step computes.
        executor: computes it.
        tokenizer: turns tokens into text.
        info: facts about the model; prompts are checked against them.
        overlap: launch step N+1 before collecting step N.
        seed: seed of the seeds drawn for requests that bring none.
        compiles: the executor's compile counts, for `load`.
        predictor: foretells the lengths of answers, for policies that go by them.
        num_shards: data shards of the mesh.
        buckets: what the executor pads steps to, for the records; None if it does not.
        ready_buckets: says which of them are compiled by now; by default all.
        store: KV pages off the device, for `load`.
        events: where the caches tell what pages come and go.
        profiler: records what the executor's devices do; None if nothing does.
        embedding_pooling: `mean` or `last`: which of a text's states become its embedding.
        json_whitespace: as in `EngineConfig`.

    Attributes:
        executor, predictor: as given; a benchmark may put another in between.
        histogram: how large the steps were.
        rule_maker: makes the `rules` of `add`; safe to call from any thread.
        kv_events: pages stored and removed, in all tiers: what a router by prefix follows.
        records: the last steps and requests, and who is told of them.
        profiles: takes profiles on demand.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        tokenizer: Tokenizer,
        info: ModelInfo,
        *,
        overlap: bool = True,
        seed: int = 0,
        compiles: CompileCounter | None = None,
        predictor: LengthPredictor | None = None,
        num_shards: int = 1,
        buckets: Buckets | None = None,
        ready_buckets: Callable[[], Buckets] | None = None,
        store: PageStore | None = None,
        events: EventLog | None = None,
        profiler: Profiler | None = None,
        embedding_pooling: str = "mean",
        json_whitespace: str = "little",
    ) -> None:
        self.tokenizer = tokenizer
        self.info = info
        self._scheduler = scheduler
        self.executor = executor
        self._overlap = overlap
        self._pooling = embedding_pooling
        self._seeds = random.Random(seed)
        self._compiles = compiles or CompileCounter()
        self.predictor = predictor or NoPredictor()
        self.histogram = StepHistogram(num_shards)
        self.kv_events = events or EventLog()
        self.records = EngineRecords(buckets, num_shards, ready_buckets=ready_buckets)
        self.profiles = ProfileCapture(profiler)
        self._store = store
        self.rule_maker = RuleMaker(tokenizer, info.vocab_size, info.eos_token_ids, json_whitespace)
        self._masks = MaskFiller(info.vocab_size)
        self._streams: dict[int, RequestStream] = {}
        self._in_flight: _Launched | None = None
        self._collected_at = 0.0
        self._lifeline = Lifeline()
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_finished = 0
        self._num_aborted = 0
        self._num_shed = 0
        close_at_exit(self)

    @property
    def has_store(self) -> bool:
        """Whether there is room for KV pages off the device."""
        return self._store is not None

    @property
    def is_open(self) -> bool:
        """Whether it is not closed, and not about to be as the interpreter ends."""
        return self._lifeline.is_open

    def check(self) -> None:
        """Say whether it still serves.

        Raises:
            EngineDead: a step has failed, or it is closed.
        """
        self._lifeline.check()

    @property
    def has_work(self) -> bool:
        """Whether another `step` can move anything forward."""
        if self._lifeline.has_failed:
            return False
        return self._scheduler.has_work or self._in_flight is not None

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        service: ServiceParams | None = None,
        *,
        now: float = 0.0,
        rules: SamplingRules | None = None,
    ) -> None:
        """Queue a request.

        Args:
            request_id: unique among the active requests.
            prompt_token_ids: at least one token, each within the vocabulary.
            params: how to sample and when to stop.
            service: its place among the others; default `ServiceParams()`.
            now: arrival time in seconds, on the same clock as `step`'s.
            rules: what `rule_maker` made of the params, if the caller has asked it already.

        Raises:
            InvalidRequest: the prompt is empty, too long or not made of tokens, or what the
                params ask for cannot be done.
            QueueFull: too many requests wait already.
            EngineDead: a step has failed, or the engine is closed.
        """
        self._lifeline.check()
        if not isinstance(params, SamplingParams):
            raise InvalidRequest(f"sampling params are SamplingParams, not {type(params).__name__}")
        prompt = self._tokens(prompt_token_ids)
        rules = rules or self.rule_maker.make(params)
        request = self._request(request_id, prompt, params, service, now)
        if request.is_answered:
            request.predicted_len = self.predictor.predict(request)
        num_top = params.prompt_logprobs
        scorer = None if num_top is None else PromptScorer(prompt, num_top, self.executor.score)
        self._queue(OutputStream(request, self.tokenizer, self.info.eos_token_ids, rules, scorer))

    def add_embedding(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        service: ServiceParams | None = None,
        *,
        now: float = 0.0,
    ) -> None:
        """Queue a request for the embedding of a text, which is on its one delta.

        Args, Raises: see `add`.
        """
        self._lifeline.check()
        prompt = self._tokens(prompt_token_ids)
        request = self._request(request_id, prompt, _EMBEDDING, service, now)
        self._queue(EmbeddingStream(request, PromptPooler(prompt, self._pooling)))

    def _request(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        service: ServiceParams | None,
        now: float,
    ) -> Request:
        """A request; one without an answer has a known length, and teaches a predictor nothing."""
        limit = self.info.max_model_len
        is_answered = params.max_tokens != 0
        seed = self._seeds.getrandbits(32) if params.seed is None else params.seed
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            params=params,
            service=service or ServiceParams(),
            max_tokens=limit if params.max_tokens is None else max(params.max_tokens, 1),
            is_answered=is_answered,
            predicted_len=None if is_answered else 1.0,
            seed=(seed ^ (seed >> 32)) & 0xFFFFFFFF,
            arrival_time=now,
        )
        request.fit(limit)
        return request

    def _queue(self, stream: RequestStream) -> None:
        request = stream.request
        with self._lifeline.between_steps():
            try:
                self._lifeline.check()  # once more: it may be closed on another thread
                self._scheduler.add(request)
            except JaxserveError:
                self.predictor.finished(request)  # it may forget the request
                raise
            self._num_prompt_tokens += len(request.prompt_token_ids)
            self._streams[request.key] = stream

    def _tokens(self, token_ids: Sequence[int]) -> list[int]:
        """A prompt's tokens, which are the vocabulary's."""
        prompt = integers("prompt_token_ids", token_ids)
        if prompt and (min(prompt) < 0 or max(prompt) >= self.info.vocab_size):
            raise InvalidRequest(
                f"prompt token ids must be in [0, {self.info.vocab_size}), "
                f"got {min(prompt)}..{max(prompt)}",
                param="prompt",
            )
        return prompt

    def abort(self, request_id: str) -> TokenDelta | None:
        """End a request now and free what it holds; its last delta, or None if unknown."""
        with self._lifeline.between_steps():
            request = self._scheduler.get(request_id)
            if request is None or self._lifeline.has_failed:
                return None
            self._num_aborted += 1
            return self._end(request, FinishReason.ABORT)

    def step(self, now: float) -> list[TokenDelta]:
        """Run one turn of the loop and return what it produced (possibly nothing).

        Args:
            now: seconds on any monotonic clock; handed to the scheduler.

        Raises:
            EngineDead: a step has failed before, or the engine is closed.
            Exception: what failed in this one; the engine is dead now.
        """
        with self._lifeline.step():
            return self._step(now)

    def _step(self, now: float) -> list[TokenDelta]:
        self.records.set_clock(now)
        plan = self._scheduler.plan(now)
        launched = None
        if plan is not None:
            sizes = self.histogram.add(plan)
            launched = _Launched(plan, self.executor.launch(plan), time.perf_counter(), sizes)
        deltas: list[TokenDelta] = []
        late = launched if plan is not None and plan.is_late else None
        if self._overlap:
            launched, self._in_flight = self._in_flight, launched
        elif late is not None:
            deltas += self._sample(late)
        if launched is not None:
            deltas += self._collect(launched)
        if self._overlap and late is not None:
            # Now all tokens before it are known; the device computes the layers meanwhile.
            deltas += self._sample(late)
        if self._scheduler.num_fetches:
            idle = plan is None and launched is None
            for done in self.executor.poll(wait=idle):
                self._scheduler.fetched(done, now)
        for request in self._scheduler.take_shed():
            deltas.append(self._end(request, FinishReason.SHED))
            self._num_shed += 1
        return deltas

    def _sample(self, launched: _Launched) -> list[TokenDelta]:
        """Let a late step be sampled; returns the last deltas of requests that end before it."""
        extras = late_extras(launched.plan, self._streams, self._masks)
        self.executor.sample(launched.handle, extras.by_row)
        self._num_finished += len(extras.complete)
        return [
            *(self._end(request, FinishReason.STOP) for request in extras.complete),
            *(self._end(request, FinishReason.ERROR, error) for request, error in extras.failed),
        ]

    def _end(
        self, request: Request, reason: FinishReason, error: JaxserveError | None = None
    ) -> TokenDelta:
        """End a request without another token; returns its last delta."""
        self._scheduler.abort(request.request_id, reason)  # those shed are known to have ended
        self.predictor.finished(request)
        stream = self._streams.pop(request.key)
        self.records.request_done(request, reason, stream.num_output_tokens)
        return stream.ended(reason, error)

    def _collect(self, launched: _Launched) -> list[TokenDelta]:
        plan = launched.plan
        result = self.executor.collect(launched.handle)
        collected_at = time.perf_counter()
        # The device begins a step when it is launched, or when it is done with the one before.
        started_at = max(launched.at, self._collected_at)
        self._scheduler.observe(plan, collected_at - started_at)
        self._collected_at = collected_at
        self._num_steps += 1
        deltas: list[TokenDelta] = []
        answered: list[Request] = []
        prompted: list[Request] = []
        finished: dict[int, FinishReason] = {}
        logprobs = result.logprobs
        for i, (row, token_id) in enumerate(zip(plan.rows, result.token_ids.tolist(), strict=True)):
            if not (row.samples or row.wants_hidden):  # mid-prompt
                continue
            stream = self._streams.get(row.key)
            if stream is None:  # finished or aborted since the launch
                continue
            if row.wants_hidden:
                stream.take_hidden(row.start, result.token_hidden[i])
                if not row.samples:
                    continue
            delta = stream.push(token_id, logprobs.get(i))
            deltas.append(delta)
            (answered if delta.token_ids else prompted).append(stream.request)
            if delta.finish_reason is not None:
                finished[row.key] = delta.finish_reason
        self._scheduler.commit(plan, result, finished)
        if result.hidden is not None:
            self._refine(plan, result.hidden, finished)
        self.records.step_done(
            plan,
            launched.sizes,
            launched=launched.at,
            collected=collected_at,
            seconds=collected_at - started_at,
            answered=answered,
            prompted=prompted,
            load=self._gauges(),
        )
        for key, reason in finished.items():
            stream = self._streams.pop(key)
            self.predictor.finished(stream.request)
            self.records.request_done(stream.request, reason, stream.num_output_tokens)
        self._num_generated_tokens += len(answered)
        self._num_finished += len(finished)
        return deltas

    def _gauges(self) -> tuple[int, int, int]:
        """Running and waiting requests, and the pages that requests hold."""
        pages = self._scheduler.page_counts
        used = pages.total - pages.free - pages.cached
        return self._scheduler.num_running, self._scheduler.num_waiting, used

    def _refine(self, plan: StepPlan, hidden: np.ndarray, finished: Mapping[int, Any]) -> None:
        """Predict again the lengths of answers that have come further."""
        probed = [row.key for row in plan.rows if row.probe]
        places = [i for i, key in enumerate(probed) if key in self._streams and key not in finished]
        if not places:
            return
        requests = [self._streams[probed[i]].request for i in places]
        lengths = self.predictor.refine(requests, hidden[places])
        for request, length in zip(requests, lengths, strict=True):
            request.predicted_len = length

    def close(self) -> None:
        """End what runs and keep what is to be kept: cached pages, lengths learned. Idempotent.

        Waits for a step that another thread has under way.
        """
        with self._lifeline.close() as is_first:
            if not is_first:
                return
            try:
                if not self._lifeline.has_failed:
                    self._wind_up()
            finally:
                self.executor.close()
                self.predictor.close()

    def _wind_up(self) -> None:
        """End all requests, see the last step through, and save what the cache has."""
        for stream in list(self._streams.values()):
            self.abort(stream.request.request_id)
        while self._in_flight is not None or self._scheduler.num_fetches:
            self._step(time.monotonic())
        plan = self._scheduler.save_cache()
        if plan is not None:
            self.executor.collect(self.executor.launch(plan))

    def close_at_exit(self) -> None:
        """Close as the interpreter ends; a thread that would step on waits for that instead."""
        self._lifeline.hold()
        self.close()

    def load(self) -> EngineLoad:
        """Gauges and counters as of now; safe to call from another thread."""
        pages, cache = self._scheduler.page_counts, self._scheduler.cache_counts
        predictions = self.predictor.metrics()
        stored = {}
        if self._store is not None:
            stats = self._store.stats()
            stored["num_host_pages"] = stats.host.num_pages
            stored["num_disk_pages"] = stats.disk.num_pages
            stored["num_corrupt_pages"] = stats.corrupt_pages
        return EngineLoad(
            num_waiting=self._scheduler.num_waiting,
            num_running=self._scheduler.num_running,
            num_free_pages=pages.free,
            num_cached_pages=pages.cached,
            num_total_pages=pages.total,
            num_steps=self._num_steps,
            num_preemptions=self._scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_finished=self._num_finished,
            num_aborted=self._num_aborted,
            num_shed=self._num_shed,
            num_queried_tokens=cache.queried_tokens,
            num_device_hit_tokens=cache.device_hit_tokens,
            num_store_hit_tokens=cache.store_hit_tokens,
            num_restored_tokens=cache.restored_tokens,
            compiles_before_ready=self._compiles.before_ready,
            compiles_after_ready=self._compiles.after_ready,
            compiles_planned=self._compiles.by_plan,
            num_predictions=predictions.samples,
            prediction_mae=predictions.mae,
            prediction_bucket_accuracy=predictions.bucket_accuracy,
            prediction_kendall_tau=predictions.kendall_tau,
            **stored,
        )

    def kv_map(self, max_bins: int) -> KvMap:
        """Where KV pages are, in all tiers; safe to call from another thread.

        Args:
            max_bins: how finely the device's pages are shown, over all shards.
        """
        stats = self._store.stats() if self._store is not None else None
        return KvMap(
            device=self._scheduler.page_maps(max_bins),
            host=stats.host if stats is not None else None,
            disk=stats.disk if stats is not None else None,
        )
