"""Reads a `ModelConfig` from the metadata of a GGUF file, by its family's declaration."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.core.errors import ConfigError
from jaxserve.models.config import MAX_LAYERS, ModelConfig
from jaxserve.models.config_keys import check_keys
from jaxserve.models.config_values import ConfigValues
from jaxserve.models.family import GgufFormat
from jaxserve.models.registry import FAMILIES

_WHERE = "GGUF metadata"
_FORMATS = {
    arch: (family, form) for family in FAMILIES.values() for arch, form in family.gguf.items()
}


def from_gguf(
    metadata: Mapping[str, Any],
    *,
    name: str = "",
    vocab_size: int | None = None,
    tie_embeddings: bool = False,
    rope_factors: Sequence[float] | None = None,
    allow_unknown: bool = False,
) -> ModelConfig:
    """Read the metadata of a GGUF file (Python values under their GGUF keys).

    Args:
        metadata: key to value, for example `{"general.architecture": "llama", ...}`.
        name: what to call the model; by default `general.name`.
        vocab_size: rows of the embedding; by default what the metadata says.
        tie_embeddings: whether the file has no `output.weight`.
        rope_factors: the values of `rope_freqs.weight` (float [head_dim / 2]), where GGUF
            keeps Llama 3.1's frequency scaling.
        allow_unknown: go on with keys that are not known, see `check_keys`.

    Raises:
        ConfigError: the architecture, or a feature that it asks for, is not supported.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in _FORMATS:
        raise ConfigError(
            f"GGUF architecture {arch!r} is not supported; supported: {', '.join(_FORMATS)}"
        )
    family, form = _FORMATS[arch]
    values = _of_architecture(metadata, arch, form, allow_unknown)
    sizes = _sizes(values, metadata, vocab_size)
    tokens = ConfigValues(metadata, _WHERE, "tokenizer.ggml.")
    bos = tokens.token_ids("bos_token_id")
    ends = [i for kind in ("eos", "eot", "eom") for i in tokens.token_ids(f"{kind}_token_id")]
    common = {
        **sizes,
        "name": name or str(metadata.get("general.name", arch)),
        "norm_eps": _round_float32(values.number(form.norm_eps, least=0)),
        "tie_embeddings": tie_embeddings,
        "eos_token_ids": tuple(dict.fromkeys(ends)),
        "bos_token_id": bos[0] if bos else None,
    }
    factors = None if rope_factors is None else list(rope_factors)
    return ModelConfig(family=family.name, **{**common, **form.fields(values, sizes, factors)})


def _of_architecture(
    metadata: Mapping[str, Any], arch: str, form: GgufFormat, allow_unknown: bool
) -> ConfigValues:
    """The architecture's own keys, checked, without its name before each."""
    own: dict[str, Any] = {}
    for key, value in metadata.items():
        if not key.startswith(f"{arch}.") or key.removeprefix(f"{arch}.") in form.keys.by_layer:
            continue
        if isinstance(value, list | tuple):  # per-layer values: fine while all are the same
            if any(item != value[0] for item in value[1:]):
                raise ConfigError(f"{key} differs by layer, which is not supported")
            value = value[0] if value else None
        own[key.removeprefix(f"{arch}.")] = value
    check_keys(own, form.keys, f"{_WHERE} of {arch}", allow_unknown=allow_unknown)
    return ConfigValues({f"{arch}.{key}": value for key, value in own.items()}, _WHERE, f"{arch}.")


def _sizes(
    values: ConfigValues, metadata: Mapping[str, Any], vocab_size: int | None
) -> dict[str, Any]:
    heads, hidden_size = values.integer("attention.head_count"), values.integer("embedding_length")
    head_dim = values.integer("attention.key_length", hidden_size // heads)
    rotated = values.integer("rope.dimension_count", head_dim)
    if values.integer("attention.value_length", head_dim) != head_dim:
        raise ConfigError("GGUF with values of another size than keys is not supported")
    if vocab_size is None:
        tokens = ConfigValues(metadata, _WHERE).sequence("tokenizer.ggml.tokens")
        vocab_size = values.integer("vocab_size", len(tokens))
    if not vocab_size:
        raise ConfigError("GGUF metadata does not tell the vocabulary's size")
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": values.integer("feed_forward_length"),
        "num_layers": values.integer("block_count", most=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": values.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rotary_dim": None if rotated == head_dim else rotated,
        "max_model_len": values.integer("context_length"),
    }


def _round_float32(value: float) -> float:
    """Undo the widening of a float32: 1e-05, and not 9.999999747378752e-06."""
    return float(f"{value:.6g}")
