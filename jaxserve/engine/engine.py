"""The engine loop's body: the only place where scheduler and executor meet."""

import random
from collections.abc import Sequence
from typing import Any

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.request import FinishReason, Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.step import Executor, StepPlan
from jaxserve.engine.outputs import EngineLoad, ModelInfo, TokenDelta
from jaxserve.engine.stream import OutputStream
from jaxserve.runner.compile_counter import CompileCounter
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.tokenizers.base import Tokenizer


class Engine:
    """Serves requests step by step, on the caller's thread.

    One `step` is the straight line: plan, launch, collect the step before (or, without
    overlap, this one), turn tokens into text and verdicts, commit. With overlap the device
    always has the next step queued while the host works on the last one's tokens.

    Args:
        scheduler: decides what each step computes.
        executor: computes it.
        tokenizer: turns tokens into text.
        info: facts about the model; prompts are checked against them.
        overlap: launch step N+1 before collecting step N.
        seed: seed of the seeds drawn for requests that bring none.
        compiles: the executor's compile counts, for `load`.
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
    ) -> None:
        self.tokenizer = tokenizer
        self.info = info
        self._scheduler = scheduler
        self._executor = executor
        self._overlap = overlap
        self._seeds = random.Random(seed)
        self._compiles = compiles or CompileCounter()
        self._streams: dict[int, OutputStream] = {}
        self._in_flight: tuple[StepPlan, Any] | None = None
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_finished = 0
        self._num_aborted = 0

    @property
    def has_work(self) -> bool:
        """Whether another `step` can move anything forward."""
        return self._scheduler.has_work or self._in_flight is not None

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        now: float = 0.0,
    ) -> None:
        """Queue a request.

        Args:
            request_id: unique among the active requests.
            prompt_token_ids: at least one token, each within the vocabulary.
            params: how to sample and when to stop.
            now: arrival time in seconds, on the same clock as `step`'s.

        Raises:
            InvalidRequest: the prompt is empty, too long or not made of tokens.
            QueueFull: too many requests wait already.
        """
        prompt = list(prompt_token_ids)
        self._check_prompt(prompt)
        room = self.info.max_model_len - len(prompt)
        seed = self._seeds.getrandbits(32) if params.seed is None else params.seed
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            params=params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            seed=(seed ^ (seed >> 32)) & 0xFFFFFFFF,
            arrival_time=now,
        )
        self._scheduler.add(request)
        self._num_prompt_tokens += len(prompt)
        self._streams[request.key] = OutputStream(request, self.tokenizer, self.info.eos_token_ids)

    def _check_prompt(self, prompt: list[int]) -> None:
        if not prompt:
            raise InvalidRequest("the prompt is empty")
        if len(prompt) >= self.info.max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens, which leaves no room to answer in the "
                f"context of {self.info.max_model_len}"
            )
        if min(prompt) < 0 or max(prompt) >= self.info.vocab_size:
            raise InvalidRequest(
                f"prompt token ids must be in [0, {self.info.vocab_size}), "
                f"got {min(prompt)}..{max(prompt)}"
            )

    def abort(self, request_id: str) -> TokenDelta | None:
        """End a request now and free what it holds; its last delta, or None if unknown."""
        request = self._scheduler.get(request_id)
        if request is None:
            return None
        self._scheduler.abort(request_id)
        self._num_aborted += 1
        return self._streams.pop(request.key).aborted()

    def step(self, now: float) -> list[TokenDelta]:
        """Run one turn of the loop and return what it produced (possibly nothing).

        Args:
            now: seconds on any monotonic clock; handed to the scheduler.
        """
        plan = self._scheduler.plan(now)
        launched = (plan, self._executor.launch(plan)) if plan is not None else None
        if self._overlap:
            launched, self._in_flight = self._in_flight, launched
        return self._collect(*launched) if launched is not None else []

    def _collect(self, plan: StepPlan, handle: Any) -> list[TokenDelta]:
        result = self._executor.collect(handle)
        self._num_steps += 1
        deltas: list[TokenDelta] = []
        finished: dict[int, FinishReason] = {}
        for row, token_id in zip(plan.rows, result.token_ids.tolist(), strict=True):
            stream = self._streams.get(row.key) if row.samples else None
            if stream is None:  # mid-prompt, or finished or aborted since the launch
                continue
            delta = stream.push(token_id)
            deltas.append(delta)
            if delta.finish_reason is not None:
                finished[row.key] = delta.finish_reason
                del self._streams[row.key]
        self._scheduler.commit(plan, result, finished)
        self._num_generated_tokens += len(deltas)
        self._num_finished += len(finished)
        return deltas

    def load(self) -> EngineLoad:
        """Gauges and counters as of now; safe to call from another thread."""
        pages = self._scheduler.page_counts
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
            compiles_before_ready=self._compiles.before_ready,
            compiles_after_ready=self._compiles.after_ready,
        )
