"""Offline inference for scripts and notebooks, in the shapes that vLLM users know."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm.auto import tqdm

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import InvalidRequest
from jaxserve.core.plain_values import integer, integers, json_value, listed, string
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.core.vllm_names import engine_options
from jaxserve.engine.build import build_sync_engine
from jaxserve.engine.outputs import EngineLoad, ModelInfo, TokenDelta
from jaxserve.engine.shared_engine import Ask, SharedEngine
from jaxserve.engine.stages import told_on_stderr
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

    It needs no event loop, so that it works the same in a script, a notebook and inside a running
    loop. What a start does is told by bars on a terminal, elsewhere by log lines, on stderr unless
    logging is set up.

    Threads may share it: what they ask for at the same time is computed in one batch, each step on
    a thread of the `LLM`'s own. So any exception (Ctrl-C, a timeout) may end a call at any moment:
    its requests are aborted, and the other threads' and later calls go on.

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
        self._shared = SharedEngine(self._engine)
        self._numbers = itertools.count()

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
        """End what runs, and keep what outlives the engine: KV pages on disk, lengths learned.

        Calls under way on other threads end with EngineDead.
        """
        self._shared.close()

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
                ask = self._ask(name, result.prompt_token_ids, sampling.of_answer(index), service)
                take = functools.partial(append, result, index, decode=self._token_text)
                requests.append(_Request(ask, take))
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
                json_value("messages", listed("messages", chat)),
                tools=json_value("tools", tools),
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
            ask = Ask(given.request_id, add)
            requests.append(_Request(ask, functools.partial(_embedded, output)))
        self._run(requests, "embedding", use_tqdm)
        return results

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[TokenDelta]:
        """Complete one prompt, token by token.

        The request starts with the first `next`, and goes on while the next delta is waited for
        (or other calls keep the engine going); closing the iterator aborts it.

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
        ask = self._ask(result.request_id, result.prompt_token_ids, params, ServiceParams())
        yield from self._shared.deltas([ask], is_stream=True)

    def _result(self, prompt: Prompt, n: int) -> RequestOutput:
        if isinstance(prompt, str):
            text, ids = prompt, self.tokenizer.encode(string("prompt", prompt))
        elif isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            text = prompt.get("prompt")
            ids = integers("prompt_token_ids", prompt["prompt_token_ids"])
        else:
            raise InvalidRequest("a prompt is a string or {'prompt_token_ids': [...]}")
        outputs = [CompletionOutput(index) for index in range(n)]
        return RequestOutput(str(next(self._numbers)), text, ids, outputs)

    def _ask(
        self, name: str, prompt: list[int], params: SamplingParams, service: ServiceParams
    ) -> Ask:
        """A request for an answer; its grammar is compiled here, where only its caller waits."""
        maker = self._engine.rule_maker
        rules = maker.make(params) if maker.is_slow(params) else None
        return Ask(
            name, functools.partial(self._engine.add, name, prompt, params, service, rules=rules)
        )

    def _token_text(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id], skip_special_tokens=False)

    def _run(self, requests: "Sequence[_Request]", doing: str, use_tqdm: bool) -> None:
        takers = {request.ask.request_id: request.take for request in requests}
        bar = tqdm(total=len(requests), desc=doing, unit="request", disable=not use_tqdm)
        deltas = self._shared.deltas([request.ask for request in requests])
        with bar:
            try:
                for delta in deltas:
                    takers[delta.request_id](delta)
                    if delta.finish_reason is not None:
                        bar.update()
            finally:
                deltas.close()  # a call into C: there is no moment at which it could be left out


class _Request(NamedTuple):
    """What is asked of the engine, and who takes its deltas."""

    ask: Ask
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
