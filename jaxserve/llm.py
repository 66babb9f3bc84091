"""Offline inference for scripts and notebooks, in the shapes that vLLM users know."""

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from tqdm.auto import tqdm

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import InvalidRequest, QueueFull
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.service_params import ServiceParams
from jaxserve.engine.build import build_sync_engine
from jaxserve.engine.outputs import EngineLoad, ModelInfo, TokenDelta
from jaxserve.tokenizers.base import Tokenizer

Prompt = str | Mapping[str, Any]  # text, or {"prompt_token_ids": [...]}
Message = Mapping[str, str]
T = TypeVar("T", SamplingParams, ServiceParams)


@dataclasses.dataclass
class CompletionOutput:
    """One answer to a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None


@dataclasses.dataclass
class RequestOutput:
    """A prompt and its answers."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False


class LLM:
    """A model ready to answer, on this process's devices.

    It steps the engine on the caller's thread and needs no event loop, so that it works the
    same in a script, a notebook and inside a running loop.

    Args:
        model: as `EngineConfig.model`.
        options: any other field of `EngineConfig`.

    Raises:
        ConfigError, CheckpointError, ModelNotFound: the model cannot be loaded like this.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._engine = build_sync_engine(EngineConfig(model=model, **options))
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
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts, all in one continuous batch.

        Args:
            prompts: text or {"prompt_token_ids": [...]}, one or many.
            sampling_params: one for all, or one per prompt.
            service_params: tenants, priorities and the like: one for all, or one per prompt.
            use_tqdm: show a progress bar on stderr.

        Returns:
            One result per prompt, in order.

        Raises:
            InvalidRequest: a prompt cannot be served; the others are not answered either.
        """
        if isinstance(prompts, str | Mapping):
            prompts = [prompts]
        results = [self._result(prompt) for prompt in prompts]
        params = _one_each(sampling_params, SamplingParams(), len(results))
        services = _one_each(service_params, ServiceParams(), len(results))
        return self._run(results, params, services, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        service_params: ServiceParams | Sequence[ServiceParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several; otherwise as `generate`.

        Args:
            messages: a list of {"role": ..., "content": ...}, or a list of such lists.
            sampling_params, service_params, use_tqdm: see `generate`.
        """
        chats = [messages] if messages and isinstance(messages[0], Mapping) else messages
        ids = [self.tokenizer.apply_chat_template(chat) for chat in chats]  # type: ignore[arg-type]
        prompts = [{"prompt_token_ids": prompt} for prompt in ids]
        return self.generate(prompts, sampling_params, service_params, use_tqdm=use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[TokenDelta]:
        """Complete one prompt, token by token.

        The request starts with the first `next`; closing the iterator aborts it.

        Args:
            prompt: text or {"prompt_token_ids": [...]}.
            sampling_params: how to sample and when to stop.

        Yields:
            What each step added; `finish_reason` is set on the last one.

        Raises:
            InvalidRequest: the prompt cannot be served.
        """
        result = self._result(prompt)
        deltas: deque[TokenDelta] = deque()
        with self._requests({result.request_id: deltas.append}):
            self._add(result, sampling_params or SamplingParams(), ServiceParams())
            finished = False
            while not finished:
                while not deltas:
                    self._step()
                delta = deltas.popleft()
                finished = delta.finish_reason is not None
                yield delta

    def _result(self, prompt: Prompt) -> RequestOutput:
        if isinstance(prompt, str):
            text, ids = prompt, self.tokenizer.encode(prompt)
        elif isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            text, ids = prompt.get("prompt"), list(prompt["prompt_token_ids"])
        else:
            raise InvalidRequest("a prompt is a string or {'prompt_token_ids': [...]}")
        self._num_requests += 1
        return RequestOutput(str(self._num_requests - 1), text, ids, [CompletionOutput(0)])

    def _run(
        self,
        results: list[RequestOutput],
        params: list[SamplingParams],
        services: list[ServiceParams],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        bar = tqdm(total=len(results), desc="generating", unit="request", disable=not use_tqdm)
        unfinished = {result.request_id for result in results}

        def taker(result: RequestOutput) -> Callable[[TokenDelta], None]:
            def take(delta: TokenDelta) -> None:
                if _append(result, delta):
                    unfinished.remove(delta.request_id)
                    bar.update()

            return take

        with bar, self._requests({result.request_id: taker(result) for result in results}):
            for arguments in zip(results, params, services, strict=True):
                self._add_when_room(*arguments)
            while unfinished:
                self._step()
        return results

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

    def _add(self, result: RequestOutput, params: SamplingParams, service: ServiceParams) -> None:
        self._engine.add(
            result.request_id, result.prompt_token_ids, params, service, now=time.monotonic()
        )

    def _add_when_room(
        self, result: RequestOutput, params: SamplingParams, service: ServiceParams
    ) -> None:
        while True:
            try:
                return self._add(result, params, service)
            except QueueFull:
                self._step()

    def _step(self) -> None:
        for delta in self._engine.step(time.monotonic()):
            self._takers[delta.request_id](delta)


def _append(result: RequestOutput, delta: TokenDelta) -> bool:
    output = result.outputs[0]
    output.text += delta.text
    output.token_ids.extend(delta.token_ids)
    if delta.finish_reason is None:
        return False
    output.finish_reason = delta.finish_reason.value
    result.finished = True
    return True


def _one_each(given: T | Sequence[T] | None, default: T, count: int) -> list[T]:
    if given is None or isinstance(given, type(default)):
        return [default if given is None else given] * count
    if len(given) != count:
        name = "sampling_params" if isinstance(default, SamplingParams) else "service_params"
        raise InvalidRequest(f"{len(given)} {name} for {count} prompts")
    return list(given)
