"""Reads a `ModelConfig` from its own fields (TOML presets, Orbax).

`config_hf` and `config_gguf` read other people's files. Whatever a source asks for that the
models here do not compute (a rope type, experts, biases, quantisation) raises ConfigError by
name: a model is served as trained or not at all.
"""

import dataclasses
import importlib.resources
import tomllib
from collections.abc import Mapping
from typing import Any

from jaxserve.core.errors import ConfigError, ModelNotFound
from jaxserve.models.config import MAX_LAYERS, ModelConfig, RopeScaling
from jaxserve.models.config_values import ConfigValues, expand_window


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Turn the configuration into JSON-ready values; `config_from_dict` gives the same one back."""
    return dataclasses.asdict(config)


def config_from_dict(data: Mapping[str, Any]) -> ModelConfig:
    """Build a configuration from the names of `ModelConfig`'s own fields.

    `sliding_window` may be one number with `sliding_pattern = n` beside it: every n-th layer
    then attends fully and the others within the window (without a pattern, all within it).

    Raises:
        ConfigError: a field is unknown, missing or of a wrong type, or sizes do not fit together.
    """
    values = dict(data)
    pattern = values.pop("sliding_pattern", None)
    window = values.get("sliding_window") or ()
    num_layers = ConfigValues(values, "the configuration").integer("num_layers", most=MAX_LAYERS)
    if isinstance(window, int):
        window = expand_window(window, num_layers, pattern)
    scaling = values.get("rope_scaling")
    try:
        values["sliding_window"] = tuple(window)
        if scaling is not None:
            names = ("divisors", "short_divisors")
            divisors = {name: tuple(scaling.get(name, ())) for name in names}
            values["rope_scaling"] = _construct(RopeScaling, {**scaling, **divisors})
        for name in ("eos_token_ids", "no_rope_layers"):
            values[name] = tuple(values.get(name, ()))
        if values.get("matryoshka_dimensions") is not None:
            values["matryoshka_dimensions"] = tuple(values["matryoshka_dimensions"])
        return _construct(ModelConfig, values)
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"a field of the configuration has a wrong type: {error}") from error


def _construct(cls: type, values: Mapping[str, Any]) -> Any:
    fields = dataclasses.fields(cls)
    if unknown := set(values) - {f.name for f in fields}:
        raise ConfigError(f"unknown fields of {cls.__name__}: {', '.join(sorted(unknown))}")
    required = {f.name for f in fields if f.default is dataclasses.MISSING}
    if missing := required - set(values):
        raise ConfigError(f"missing fields of {cls.__name__}: {', '.join(sorted(missing))}")
    return cls(**values)


def preset_names() -> tuple[str, ...]:
    """Names of the presets in `model_configs/`, sorted."""
    files = importlib.resources.files("model_configs").iterdir()
    return tuple(sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml")))


def from_preset(name: str) -> ModelConfig:
    """Read the preset `model_configs/NAME.toml`.

    Raises:
        ModelNotFound: there is no such preset (the message lists those there are).
        ConfigError: the preset is wrong.
    """
    if name not in preset_names():
        raise ModelNotFound(f"no preset named {name!r}; there are: {', '.join(preset_names())}")
    text = (importlib.resources.files("model_configs") / f"{name}.toml").read_text("utf-8")
    return config_from_dict({"name": name, **tomllib.loads(text)})
