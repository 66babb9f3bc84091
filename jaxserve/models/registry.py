"""The families of models. A new one is one file and one line here."""

from jaxserve.core.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.models.families import (
    cohere,
    gemma2,
    gemma3,
    glm4,
    granite,
    llama,
    olmo,
    phi3,
    qwen2,
    qwen3,
    smollm3,
    starcoder2,
)
from jaxserve.models.family import Family
from jaxserve.models.parameters import Parameter, Shape

FAMILIES: dict[str, Family] = {
    family.FAMILY.name: family.FAMILY
    for family in (
        llama, qwen2, qwen3, smollm3, granite, olmo, gemma2, gemma3, phi3, glm4, cohere, starcoder2,
    )
}  # fmt: skip


def family_of(config: ModelConfig) -> Family:
    """The family that a model belongs to.

    Raises:
        ConfigError: there is none of that name.
    """
    name: object = config.family  # read from a file, so of any type
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(f"no family {name!r}; there are: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def parameters_of(config: ModelConfig) -> dict[str, Parameter]:
    """Every parameter of a model by its dotted name."""
    return family_of(config).parameters(config)


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shape of every parameter by its dotted name."""
    return {name: parameter.shape for name, parameter in parameters_of(config).items()}


def num_parameters(config: ModelConfig) -> int:
    """How many numbers the model's weights hold, a tied embedding counted once."""
    return sum(parameter.size for parameter in parameters_of(config).values())
