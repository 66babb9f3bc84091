"""Requests of vLLM's engine protocol, made the engine's; what cannot be applied is refused."""

from typing import Any, NamedTuple

from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.grammar import Grammar
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.outputs import ModelInfo
from jaxserve.server.limits import RequestLimits
from jaxserve.server.prompts import given_token_ids, text_token_ids
from jaxserve.server.strict import check_token_ids, refuse_fields
from jaxserve.tokenizers.base import Tokenizer

_SAME = (  # fields without presence that mean what ours mean
    "top_k", "min_p", "frequency_penalty", "presence_penalty", "min_tokens", "ignore_eos",
    "skip_special_tokens", "include_stop_str_in_output",
)  # fmt: skip
_ZERO_IS_UNSET = ("top_p", "repetition_penalty")
_OPTIONAL = ("temperature", "max_tokens", "logprobs", "prompt_logprobs")


class Generation(NamedTuple):
    """What a Generate request asks for."""

    prompt: list[int]
    params: SamplingParams
    n: int


async def read_generate(
    request: pb.GenerateRequest, tokenizer: Tokenizer, info: ModelInfo, limits: RequestLimits
) -> Generation:
    """A Generate request, checked.

    Raises:
        InvalidRequest: a field is set that cannot be applied, or has a value that makes no sense.
    """
    refuse_fields(
        request, "kv_transfer_params", "kv_transfer_params_json", "mm_inputs", "extra_mm_inputs",
        "media_refs",
    )  # fmt: skip
    if request.data_parallel_rank:  # the shards of a mesh are one rank here
        raise InvalidRequest("there is only data_parallel_rank 0", param="data_parallel_rank")
    message = request.sampling_params
    n = message.n or 1
    limits.check("max_n", n, "n")
    params = await _sampling_params(message, info, limits)
    keep = _truncation(message, info.max_model_len)
    kind = request.WhichOneof("input")
    if kind == "text":
        prompt = await text_token_ids(request.text, tokenizer, limits, param="text")
    elif kind == "tokenized":  # original_text is for people to look at
        ids = request.tokenized.input_ids
        prompt = given_token_ids(
            ids if keep is None else ids[-keep:], info.max_model_len, param="tokenized"
        )
    else:
        raise InvalidRequest("the request has no input", param="input")
    return Generation(prompt if keep is None else prompt[-keep:], params, n)


def read_embed(request: pb.EmbedRequest, info: ModelInfo) -> list[int]:
    """The token ids of an Embed request.

    Raises:
        InvalidRequest: there are none, or too many.
    """
    return given_token_ids(request.tokenized.input_ids, info.max_model_len, param="tokenized")


async def _sampling_params(
    message: pb.SamplingParams, info: ModelInfo, limits: RequestLimits
) -> SamplingParams:
    refuse_fields(message, "structural_tag")
    check_token_ids("stop_token_ids", message.stop_token_ids, info.vocab_size)
    check_token_ids("logit_bias", message.logit_bias, info.vocab_size)
    # max_tokens: as far as the context goes, as in vLLM. The model's defaults hold where a field
    # can be told to be unset: 0 says something in those of _SAME.
    given: dict[str, Any] = {"max_tokens": None, **info.default_sampling_params}
    given |= {name: getattr(message, name) for name in _SAME}
    given |= {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}
    given |= {name: value for name in _ZERO_IS_UNSET if (value := getattr(message, name))}
    # spaces_between_special_tokens is about text, of which this protocol brings none back: stop
    # strings are looked for in the tokens' own text, as vLLM's fast tokenizers do.
    # grammar_from_first_token is how grammars always begin here.
    return SamplingParams(
        seed=message.seed % 2**64 if message.HasField("seed") else None,  # negative ones, too
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias=dict(message.logit_bias),
        grammar=_grammar(message, limits),
        **given,
    )


def _grammar(message: pb.SamplingParams, limits: RequestLimits) -> Grammar | None:
    kind = message.WhichOneof("constraint")
    if kind is None:
        return None
    if kind == "json_object":
        if not message.json_object:
            raise InvalidRequest("json_object can only be true", param="json_object")
        return Grammar("json_object")
    if kind == "choice":
        options = list(message.choice.choices)
        limits.check("max_grammar_chars", sum(map(len, options)), "choice")
        return Grammar.choice(options)
    source = getattr(message, kind)
    limits.check("max_grammar_chars", len(source), kind)
    if kind == "grammar":
        return Grammar("lark", source)
    return Grammar(kind, source)


def _truncation(message: pb.SamplingParams, max_model_len: int) -> int | None:
    """How many tokens of the prompt count, at its end, as in vLLM; None for all."""
    if not message.HasField("truncate_prompt_tokens"):
        return None
    wanted = message.truncate_prompt_tokens
    if wanted == -1:
        return max_model_len - 1  # room for one token of an answer
    if wanted < 1:
        raise InvalidRequest(
            f"truncate_prompt_tokens must be -1 or positive, got {wanted}",
            param="truncate_prompt_tokens",
        )
    return min(wanted, max_model_len + 1)  # more than the context is refused either way
