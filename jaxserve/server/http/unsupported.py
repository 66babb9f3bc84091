"""Fields of the OpenAI and vLLM APIs that are known and cannot be applied.

They are refused by name, unless they have a value that asks for nothing.
"""

from typing import Any

# Field -> the values, beside null, that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "audio": (),
    "background": (False,),
    "best_of": (1,),  # of a chat
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "dimensions": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "image": (),
    "include": ([],),
    "max_tool_calls": (),
    "metadata": ({},),  # to be stored with the answer
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),  # of no tools
    "prediction": (),
    "previous_response_id": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "reasoning": ({},),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncation": ("disabled",),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "ec_transfer_params": (),
    "include_reasoning": (True,),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "prompt_embeds": (),
    "repetition_detection": (),
    "return_token_offsets": (False,),
    "session_id": (),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}


def without_neutral(data: Any, known: frozenset[str]) -> Any:
    """A request's body without the unsupported fields that ask for nothing.

    Args:
        data: the parsed body; anything but an object is left as it is.
        known: fields that this kind of request has itself.
    """
    if not isinstance(data, dict):
        return data
    return {
        name: value
        for name, value in data.items()
        if name in known or name not in UNSUPPORTED or not _is_neutral(value, UNSUPPORTED[name])
    }


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    return value is None or any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral
    )
