"""Sampling and service parameters of the protocol, made the engine's."""

from typing import Any

import grpc

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.grammar import Grammar
from jaxserve.core.sampling_defaults import SamplingDefaults
from jaxserve.core.sampling_params import SamplingParams, ThinkingBudget
from jaxserve.core.service_params import ServiceParams
from jaxserve.server.call_metadata import traceparent
from jaxserve.server.limits import RequestLimits
from jaxserve.server.security.caller import on_account
from jaxserve.server.strict import check_token_ids
from jaxserve.server.v1 import jaxserve_pb2 as pb
from jaxserve.tokenizers.base import Tokenizer

DEFAULT_MAX_TOKENS = 256
MAX_MARKER_CHARS = 256
_MAX_SPACE_TOKENS = 8  # that a template may put after the marker of thinking

_OPTIONAL = (
    "temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "ignore_eos",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens",
    "include_stop_str_in_output", "skip_special_tokens", "logprobs", "prompt_logprobs",
)  # fmt: skip


def sampling_params(
    message: pb.SamplingParams,
    *,
    prompt: list[int],
    tokenizer: Tokenizer,
    vocab_size: int,
    limits: RequestLimits,
    defaults: SamplingDefaults,
) -> SamplingParams:
    """The engine's sampling parameters; unset fields take the model's defaults, then v1's.

    Args:
        message: what the request says.
        prompt: its token ids, in which thinking may have begun.
        tokenizer: the served model's.
        vocab_size: tokens are below it.
        limits: on single requests.
        defaults: the served model's.

    Raises:
        InvalidRequest: a value is out of range, or a token is not in the vocabulary.
    """
    given: dict[str, Any] = {"max_tokens": DEFAULT_MAX_TOKENS, **defaults}
    given |= {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}
    check_token_ids("stop_token_ids", message.stop_token_ids, vocab_size)
    check_token_ids("logit_bias", message.logit_bias, vocab_size)
    if message.HasField("allowed_token_ids"):
        check_token_ids("allowed_token_ids", message.allowed_token_ids.ids, vocab_size)
        given["allowed_token_ids"] = tuple(message.allowed_token_ids.ids)
    if message.HasField("grammar"):
        given["grammar"] = _grammar(message.grammar, limits)
    if message.HasField("thinking"):
        given["thinking"] = _thinking(message.thinking, prompt, tokenizer, vocab_size)
    return SamplingParams(
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias=dict(message.logit_bias),
        bad_words=tuple(message.bad_words),
        **given,
    )


def service_params(message: pb.ServiceParams, context: grpc.aio.ServicerContext) -> ServiceParams:
    """The engine's service parameters, on the account of whoever calls.

    Raises:
        InvalidRequest: a value is out of range.
        PermissionDenied: the caller's API key is not that of the tenant named.
    """
    targets = {
        name: getattr(message, f"{name}_ms") / 1000
        for name in ("ttft_target", "tpot_target")
        if message.HasField(f"{name}_ms")
    }
    return on_account(
        ServiceParams(
            tenant=message.tenant,
            priority=message.priority,
            cache_salt=message.cache_salt,
            traceparent=traceparent(context),
            **targets,
        )
    )


def _grammar(message: pb.Grammar, limits: RequestLimits) -> Grammar:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest("grammar is of no kind", param="grammar")
    if kind == "json_object":
        if not message.json_object:
            raise InvalidRequest("json_object can only be true", param="grammar")
        return Grammar("json_object")
    if kind == "choice":
        options = list(message.choice.options)
        limits.check("max_grammar_chars", sum(map(len, options)), "grammar")
        return Grammar.choice(options)
    source = getattr(message, kind)
    limits.check("max_grammar_chars", len(source), "grammar")
    return Grammar(kind, source)


def _thinking(
    message: pb.ThinkingBudget, prompt: list[int], tokenizer: Tokenizer, vocab_size: int
) -> ThinkingBudget:
    start = _marker("start", message.start, tokenizer, vocab_size)
    end = _marker("end", message.end, tokenizer, vocab_size)
    inside = message.begins_inside
    if not message.HasField("begins_inside"):
        inside = _ends_after(prompt, start, tokenizer)
    return ThinkingBudget(message.max_tokens, start, end, inside)


def _marker(
    name: str, message: pb.Marker, tokenizer: Tokenizer, vocab_size: int
) -> tuple[int, ...]:
    param = f"thinking.{name}"
    if message.WhichOneof("form") == "text":
        if not message.text or len(message.text) > MAX_MARKER_CHARS:
            raise InvalidRequest(
                f"{param} must have 1 to {MAX_MARKER_CHARS} characters", param=param
            )
        return tuple(tokenizer.encode(message.text, add_special_tokens=False))
    ids = message.token_ids.ids
    if not 0 < len(ids) <= MAX_MARKER_CHARS:
        raise InvalidRequest(f"{param} must have 1 to {MAX_MARKER_CHARS} tokens", param=param)
    check_token_ids(param, ids, vocab_size)
    return tuple(ids)


def _ends_after(prompt: list[int], marker: tuple[int, ...], tokenizer: Tokenizer) -> bool:
    """Whether nothing but space comes after the last such marker in the prompt."""
    size = len(marker)
    for start in range(len(prompt) - size, max(-1, len(prompt) - size - _MAX_SPACE_TOKENS), -1):
        if tuple(prompt[start : start + size]) == marker:
            return not tokenizer.decode(prompt[start + size :], skip_special_tokens=False).strip()
    return False
