"""What a family of models declares: how files describe it, its parameters and its layers."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.config_keys import KnownKeys
from jaxserve.models.config_values import ConfigValues
from jaxserve.models.decoder import Layer
from jaxserve.models.parameters import Parameter

Fields = dict[str, Any]  # of ModelConfig, by name


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfFormat:
    """How a `config.json` of one model type is read.

    Attributes:
        keys: which keys are known.
        defaults: transformers' own, of what it leaves out of a file.
        fields: (values, sizes) -> the fields of `ModelConfig` that are not the same for all
            families; `sizes` are those that are, and are read already.
        norm_eps: the key of what norms add to a variance.
        text_part: (key, model type) of the language model inside one of several parts, which is
            read in its place; None: it is all there is.
    """

    keys: KnownKeys
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: Callable[[ConfigValues, Fields], Fields] = lambda values, sizes: {}
    norm_eps: str = "rms_norm_eps"
    text_part: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufFormat:
    """How the metadata of a GGUF file of one architecture is read.

    Attributes:
        keys: which of the architecture's keys are known.
        fields: (values, sizes, rope factors) -> as of `HfFormat`; the factors are the numbers of
            `rope_freqs.weight`, None if there are none.
        norm_eps: as of `HfFormat`.
    """

    keys: KnownKeys
    fields: Callable[[ConfigValues, Fields, list[float] | None], Fields]
    norm_eps: str = "attention.layer_norm_rms_epsilon"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models.

    Attributes:
        name: of the family, `ModelConfig.family`.
        parameters: every parameter of a model by its dotted name.
        layer: what computes a layer from its parameters.
        hf: model type -> how its `config.json` is read.
        gguf: architecture -> how its metadata is read.
    """

    name: str
    parameters: Callable[[ModelConfig], dict[str, Parameter]]
    layer: type[Layer]
    hf: Mapping[str, HfFormat]
    gguf: Mapping[str, GgufFormat]
