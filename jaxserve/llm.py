"""Offline inference for scripts and notebooks, in the shapes that vLLM users know."""

import contextlib
import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm.auto import tqdm

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import InvalidRequest, QueueFull
from jaxserve.core.plain_values import integer, integers, listed, string
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.core.vllm_names import engine_options
from jaxserve.engine.build import build_sync_engine
from jaxserve.engine.outputs import EngineLoad, ModelInfo, TokenDelta
from jaxserve.engine.stages import told_on_stderr
from jaxserve.interrupts import whole
from jaxserve.llm_results import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestOutput,
    append,
)
from jaxserve.tokenizers.base import Tokenizer

__all__ = [
    "LLM",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "Logprob",
    "RequestOutput",
]

Prompt = str | Mapping[str, Any]  # text, or {"prompt_token_ids": [...]}
Message = Mapping[str, Any]
T = TypeVar("T", SamplingParams, ServiceParams)


class LLM:
    """A model ready to answer, on this process's devices.

    It steps the engine on the caller's thread and needs no event loop, so that it works the
    same in a script, a notebook and inside a running loop. What a start does is told by bars on
    a terminal, elsewhere by log lines, on stderr unless logging is set up.

    Args:
        model: as `EngineConfig.model`.
        options: any other field of `EngineConfig`, or what vLLM calls it where that means the
            same: `tensor_parallel_size=4` is `mesh="tensor=4"`.

    Raises:
        ConfigError, CheckpointError, ModelNotFound: the model cannot be loaded like this.
    """

    def __init__(self, model: str, **options: Any) -> None:
        known = {field.name for field in dataclasses.fields(EngineConfig)}
        config = EngineConfig(model=model, **engine_options(options, known))
        with told_on_stderr():
            self._engine = build_sync_engine(config)
        self._num_requests = 0
        # Who takes the deltas of each unfinished request: streams may overlap other calls.
        self._takers: dict[str, Callable[[TokenDelta], object]] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._engine.tokenizer

    @property
    def model_info(self) -> ModelInfo:
        """Facts about the model and how it is run."""
        return self._engine.info

    def get_default_sampling_params(self) -> SamplingParams:
        """How is sampled where a call does not say: as the model advises (`generation_config`)."""
        return SamplingParams(**self.model_info.default_sampling_params)  # type: ignore[arg-type]

    def load(self) -> EngineLoad:
        """The engine's counters."""
        return self._engine.load()

    def close(self) -> None:
        """End what runs, and keep what outlives the engine: KV pages on disk, lengths learned."""
        self._engine.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        service_params: ServiceParams | Sequence[ServiceParams] | None = None,
        *,
        n: int = 1,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts, all in one continuous batch.

        Args:
            prompts: text or {"prompt_token_ids": [...]}, one or many.
            sampling_params: one for all, or one per prompt; None for
                `get_default_sampling_params()`.
            service_params: tenants, priorities and the like: one for all, or one per prompt.
            n: answers per prompt; with a seed, the i-th is sampled with seed + i.
            use_tqdm: show a progress bar on stderr.

        Returns:
            One result per prompt, in order. An answer that could not go on (its grammar became
            too complex, say) has the `finish_reason` "error".

        Raises:
            InvalidRequest: a prompt cannot be served; the others are not answered either.
        """
        n = integer("n", n)
        if n < 1:
            raise InvalidRequest(f"n must be at least 1, got {n}")
        results = [self._result(prompt, n) for prompt in _as_list(prompts)]
        params = _one_each(sampling_params, self.get_default_sampling_params(), len(results))
        services = _one_each(service_params, ServiceParams(), len(results))
        requests: list[_Request] = []
        for result, sampling, service in zip(results, params, services, strict=True):
            for index in range(n):
                name = result.request_id if n == 1 else f"{result.request_id}-{index}"
                add = functools.partial(
                    self._engine.add,
                    name,
                    result.prompt_token_ids,
                    sampling.of_answer(index),
                    service,
                )
                take = functools.partial(append, result, index, decode=self._token_text)
                requests.append(_Request(name, add, take))
        self._run(requests, "generating", use_tqdm)
        return results

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        service_params: ServiceParams | Sequence[ServiceParams] | None = None,
        *,
        n: int = 1,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several; otherwise as `generate`.

        Args:
            messages: a list of {"role": ..., "content": ...}, or a list of such lists.
            sampling_params, service_params, n, use_tqdm: see `generate`.
            tools: functions that the model may call, as in OpenAI's API; its calls are part of
                the text.
            chat_template_kwargs: more variables for the chat template.
        """
        given = listed("messages", messages)
        chats = [given] if given and isinstance(given[0], Mapping) else given
        ids = [
            self.tokenizer.apply_chat_template(
                listed("messages", chat),
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
            )
            for chat in chats
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in ids]
        return self.generate(prompts, sampling_params, service_params, n=n, use_tqdm=use_tqdm)

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, use_tqdm: bool = True
    ) -> list[EmbeddingRequestOutput]:
        """One vector per text: the model's last hidden states, pooled (`embedding_pooling`).

        Args:
            prompts: text or {"prompt_token_ids": [...]}, one or many.
            use_tqdm: show a progress bar on stderr.

        Returns:
            One result per prompt, in order.

        Raises:
            InvalidRequest: a prompt cannot be served; the others are not answered either.
        """
        results: list[EmbeddingRequestOutput] = []
        requests: list[_Request] = []
        for prompt in _as_list(prompts):
            given = self._result(prompt, 0)
            output = EmbeddingOutput(np.zeros(0, np.float32))
            results.append(
                EmbeddingRequestOutput(
                    given.request_id, given.prompt, given.prompt_token_ids, output
                )
            )
            add = functools.partial(
                self._engine.add_embedding, given.request_id, given.prompt_token_ids
            )
            requests.append(_Request(given.request_id, add, functools.partial(_embedded, output)))
        self._run(requests, "embedding", use_tqdm)
        return results

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[TokenDelta]:
        """Complete one prompt, token by token.

        The request starts with the first `next`; closing the iterator aborts it.

        Args:
            prompt: text or {"prompt_token_ids": [...]}.
            sampling_params: how to sample and when to stop; None as for `generate`.

        Yields:
            What each step added; `finish_reason` is set on the last one.

        Raises:
            InvalidRequest: the prompt cannot be served.
        """
        result = self._result(prompt, 0)
        [params] = _one_each(sampling_params, self.get_default_sampling_params(), 1)
        deltas: deque[TokenDelta] = deque()
        with self._requests({result.request_id: deltas.append}):
            self._engine.add(
                result.request_id, result.prompt_token_ids, params, now=time.monotonic()
            )
            finished = False
            while not finished:
                while not deltas:
                    self._step()
                delta = deltas.popleft()
                finished = delta.finish_reason is not None
                yield delta

    def _result(self, prompt: Prompt, n: int) -> RequestOutput:
        if isinstance(prompt, str):
            text, ids = prompt, self.tokenizer.encode(string("prompt", prompt))
        elif isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            text = prompt.get("prompt")
            ids = integers("prompt_token_ids", prompt["prompt_token_ids"])
        else:
            raise InvalidRequest("a prompt is a string or {'prompt_token_ids': [...]}")
        self._num_requests += 1
        outputs = [CompletionOutput(index) for index in range(n)]
        return RequestOutput(str(self._num_requests - 1), text, ids, outputs)

    def _token_text(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id], skip_special_tokens=False)

    def _run(self, requests: "Sequence[_Request]", doing: str, use_tqdm: bool) -> None:
        bar = tqdm(total=len(requests), desc=doing, unit="request", disable=not use_tqdm)
        unfinished = {request.name for request in requests}

        def taker(request: _Request) -> Callable[[TokenDelta], None]:
            def take(delta: TokenDelta) -> None:
                request.take(delta)
                if delta.finish_reason is not None:
                    unfinished.remove(request.name)
                    bar.update()

            return take

        with bar, self._requests({request.name: taker(request) for request in requests}):
            for request in requests:
                with whole():
                    self._add_when_room(request)
            while unfinished:
                self._step()

    @contextlib.contextmanager
    def _requests(self, takers: Mapping[str, Callable[[TokenDelta], object]]) -> Iterator[None]:
        """Deliver these requests' deltas; leave nothing of them in the engine at the end."""
        self._takers.update(takers)
        try:
            yield
        finally:
            for request_id in takers:
                del self._takers[request_id]
                self._engine.abort(request_id)  # does nothing to one that is finished
            while self._engine.has_work and not self._takers:  # a step that was under way
                self._step()

    def _add_when_room(self, request: "_Request") -> None:
        while True:
            try:
                return request.add(now=time.monotonic())
            except QueueFull:
                self._step()

    def _step(self) -> None:
        with whole():
            for delta in self._engine.step(time.monotonic()):
                self._takers[delta.request_id](delta)


class _Request(NamedTuple):
    """A request's name in the engine, what queues it there (`now=`), and who takes its deltas."""

    name: str
    add: Callable[..., None]
    take: Callable[[TokenDelta], object]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    return [prompts] if isinstance(prompts, str | Mapping) else listed("prompts", prompts)


def _embedded(output: EmbeddingOutput, delta: TokenDelta) -> None:
    assert delta.embedding is not None
    output.embedding = delta.embedding.values


def _one_each(given: T | Sequence[T] | None, default: T, count: int) -> list[T]:
    if given is None or isinstance(given, type(default)):
        return [default if given is None else given] * count
    name = "sampling_params" if isinstance(default, SamplingParams) else "service_params"
    each = listed(name, given)
    if not all(isinstance(one, type(default)) for one in each):
        raise InvalidRequest(f"{name} must be {type(default).__name__}, one or a list", param=name)
    if len(each) != count:
        raise InvalidRequest(f"{len(each)} {name} for {count} prompts")
    return each
