"""Offline inference for scripts and notebooks, in the shapes that vLLM users know."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import InvalidRequest
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.build import build_sync_engine
from jaxserve.engine.outputs import EngineLoad, ModelInfo, TokenDelta
from jaxserve.tokenizers.base import Tokenizer

Prompt = str | Mapping[str, Any]  # text, or {"prompt_token_ids": [...]}
Message = Mapping[str, str]


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

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts, all in one continuous batch.

        Args:
            prompts: text or {"prompt_token_ids": [...]}, one or many.
            sampling_params: one for all, or one per prompt.
            use_tqdm: show a progress bar on stderr.

        Returns:
            One result per prompt, in order.

        Raises:
            InvalidRequest: a prompt cannot be served; nothing has been generated then.
        """
        if isinstance(prompts, str | Mapping):
            prompts = [prompts]
        results = [self._result(prompt) for prompt in prompts]
        return self._run(results, _one_each(sampling_params, len(results)), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several; otherwise as `generate`.

        Args:
            messages: a list of {"role": ..., "content": ...}, or a list of such lists.
            sampling_params, use_tqdm: see `generate`.
        """
        chats = [messages] if messages and isinstance(messages[0], Mapping) else messages
        ids = [self.tokenizer.apply_chat_template(chat) for chat in chats]  # type: ignore[arg-type]
        prompts = [{"prompt_token_ids": prompt} for prompt in ids]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

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
        self, results: list[RequestOutput], params: list[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        by_id = {result.request_id: result for result in results}
        added: list[str] = []
        bar = tqdm(total=len(results), desc="generating", unit="request", disable=not use_tqdm)
        try:
            for result, param in zip(results, params, strict=True):
                self._engine.add(
                    result.request_id, result.prompt_token_ids, param, now=time.monotonic()
                )
                added.append(result.request_id)
            while self._engine.has_work:
                for delta in self._engine.step(time.monotonic()):
                    if _append(by_id[delta.request_id], delta):
                        bar.update()
        except BaseException:  # an interrupted cell must leave nothing behind in the engine
            for request_id in added:
                self._engine.abort(request_id)
            raise
        finally:
            bar.close()
        return results


def _append(result: RequestOutput, delta: TokenDelta) -> bool:
    output = result.outputs[0]
    output.text += delta.text
    output.token_ids.extend(delta.token_ids)
    if delta.finish_reason is None:
        return False
    output.finish_reason = delta.finish_reason.value
    result.finished = True
    return True


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidRequest(f"{len(params)} sampling_params for {count} prompts")
    return list(params)
