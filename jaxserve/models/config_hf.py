"""Reads a `ModelConfig` from a Hugging Face config.json, by its family's declaration."""

from collections.abc import Mapping
from typing import Any

from jaxserve.core.errors import ConfigError
from jaxserve.models import hf_fields
from jaxserve.models.config import ModelConfig
from jaxserve.models.config_keys import check_keys
from jaxserve.models.config_values import ConfigValues
from jaxserve.models.family import Family, HfFormat
from jaxserve.models.registry import FAMILIES

# Where null is a value of its own: no window, as many KV heads as query heads.
_NULLS = ("sliding_window", "num_key_value_heads")
_OUTER_KEYS = ("tie_word_embeddings", "eos_token_id", "bos_token_id")
_WHERE = "config.json"
_FORMATS = {
    kind: (family, form) for family in FAMILIES.values() for kind, form in family.hf.items()
}


def from_hf_config(
    data: Mapping[str, Any],
    *,
    name: str = "",
    generation_config: Mapping[str, Any] | None = None,
    allow_unknown: bool = False,
) -> ModelConfig:
    """Read a Hugging Face `config.json` (transformers 4 or 5) of a supported architecture.

    Args:
        data: the parsed file; of a model of several parts the language model is read.
        name: what to call the model; by default what the file says, or its model type.
        generation_config: the parsed `generation_config.json`; its EOS tokens come first.
        allow_unknown: go on with keys that are not known, see `check_keys`.

    Raises:
        ConfigError: the architecture, or a feature that it asks for, is not supported.
    """
    family, form, text = _text_part(data, allow_unknown)
    check_keys(text, form.keys, _WHERE, allow_unknown=allow_unknown)
    # null means the default, but for a few.
    given = {k: v for k, v in text.items() if v is not None or k in _NULLS}
    values = ConfigValues({**form.defaults, **given}, _WHERE, allow_unknown=allow_unknown)
    sizes = hf_fields.sizes(values)
    generation = ConfigValues(generation_config or {}, "generation_config.json")
    eos = [*generation.token_ids("eos_token_id"), *values.token_ids("eos_token_id")]
    bos = values.token_ids("bos_token_id")
    common = {
        **sizes,
        "name": name or str(data.get("_name_or_path") or data["model_type"]),
        "norm_eps": values.number(form.norm_eps, least=0),
        "tie_embeddings": values.flag("tie_word_embeddings", False),
        "activation": hf_fields.activation(values),
        "eos_token_ids": tuple(dict.fromkeys(eos)),
        "bos_token_id": bos[0] if bos else None,
        "matryoshka_dimensions": hf_fields.matryoshka(values),
    }
    return ModelConfig(family=family.name, **{**common, **form.fields(values, sizes)})


def _text_part(
    data: Mapping[str, Any], allow_unknown: bool
) -> tuple[Family, HfFormat, Mapping[str, Any]]:
    """The family of what is served, how it is read, and its configuration."""
    model_type, text = data.get("model_type"), data
    if not isinstance(model_type, str) or model_type not in _FORMATS:
        raise ConfigError(
            f"architecture {model_type!r} is not supported; supported: {', '.join(_FORMATS)}"
        )
    family, form = _FORMATS[model_type]
    if form.text_part is not None:
        check_keys(data, form.keys, _WHERE, allow_unknown=allow_unknown)
        key, inner = form.text_part
        family, form = _FORMATS[inner]
        # Token ids and tying beside the nested text configuration win over those inside it.
        outer = {k: v for k, v in data.items() if k in _OUTER_KEYS and v is not None}
        text = {**ConfigValues(data, _WHERE).mapping(key).values, **outer}
    return family, form, text
