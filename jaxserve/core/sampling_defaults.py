"""What a model's authors advise for sampling: defaults of requests that do not say."""

import logging
from collections.abc import Mapping
from typing import Any

from jaxserve.core.errors import ConfigError, InvalidRequest
from jaxserve.core.sampling_params import SamplingParams

log = logging.getLogger(__name__)

# Fields of `SamplingParams` and their values.
SamplingDefaults = Mapping[str, float | int]

# As vLLM reads a generation_config.json: these and no others.
_HF_NAMES = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens",
}  # fmt: skip
# llama.cpp's, each after `general.sampling.`.
_GGUF_NAMES = {
    "temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}  # fmt: skip
_GGUF_PREFIX = "general.sampling."
# What else would change an answer, and the values at which it does not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1,), "num_beams": (1,),
    "penalty_alpha": (0,), "guidance_scale": (1,), "min_new_tokens": (0,), "bad_words_ids": ([],),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "sequence_bias": ({},),
    "forced_bos_token_id": (), "forced_eos_token_id": (), "stop_strings": ([],),
    "xtc_probability": (0,), "mirostat": (0,),
}  # fmt: skip


def from_generation_config(values: Mapping[str, Any], where: str) -> SamplingDefaults:
    """The defaults in a generation_config.json; what it asks for beside them is logged.

    Args:
        values: the parsed file.
        where: what to call it in messages.

    Raises:
        ConfigError: a value is out of range.
    """
    return _taken(values, _HF_NAMES, where)


def to_generation_config(defaults: SamplingDefaults) -> dict[str, float | int]:
    """What `from_generation_config` reads the same defaults from."""
    return {key: defaults[name] for key, name in _HF_NAMES.items() if name in defaults}


def from_gguf_metadata(metadata: Mapping[str, Any], where: str) -> SamplingDefaults:
    """The defaults in the metadata of a GGUF file; see `from_generation_config`."""
    values = {
        key.removeprefix(_GGUF_PREFIX): float(f"{value:.6g}") if type(value) is float else value
        for key, value in metadata.items()
        if key.startswith(_GGUF_PREFIX)
    }
    return _taken(values, _GGUF_NAMES, where)


def described(defaults: SamplingDefaults) -> str:
    """The defaults in one line."""
    return ", ".join(f"{name}={value:g}" for name, value in defaults.items())


def _taken(values: Mapping[str, Any], names: Mapping[str, str], where: str) -> SamplingDefaults:
    defaults: dict[str, float | int] = {}
    for key, name in names.items():
        value = values.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{where}: {key} must be a number, not {str(value)[:60]!r}")
        try:
            if name in ("top_k", "max_tokens"):
                if value != int(value):
                    raise InvalidRequest("it is not a whole number")
                value = int(value)
            defaults[name] = value
            SamplingParams(**{"max_tokens": None, name: defaults[name]})  # type: ignore[arg-type]
        except (InvalidRequest, ValueError, OverflowError) as error:
            raise ConfigError(f"{where}: {key} cannot be {value}: {error}") from error
    unused = [
        f"{key} = {str(values[key])[:40]}"
        for key, neutral in _NEUTRAL.items()
        if values.get(key) is not None and values[key] not in neutral
    ]
    if unused:
        log.info("%s: not applied, as it is not known here: %s", where, ", ".join(unused))
    return defaults
