"""Which products an engine runs: how weights are held, and what multiplies by them."""

import logging
from collections.abc import Mapping

import numpy as np

from jaxserve.checkpoints.base import Checkpoint
from jaxserve.checkpoints.storage import formats_of, named, stored
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.models.parameters import Parameter
from jaxserve.models.weights import Storage
from jaxserve.parallel.mesh import ShardingRules
from pallas_kernels import linear
from pallas_kernels.weights import Format

log = logging.getLogger(__name__)

KERNELS = {"cpu"}  # implementations that multiply by a quantised weight as it lies in memory


def choose_products(
    config: EngineConfig,
    checkpoint: Checkpoint,
    parameters: Mapping[str, Parameter],
    rules: ShardingRules,
    dtype: np.dtype,
) -> tuple[str, dict[str, Storage]]:
    """Decide how weights are held, and the implementation of `pallas_kernels.linear`.

    Args:
        config: the engine's options.
        checkpoint: where weights come from.
        parameters: the model's, as it runs.
        rules: the mesh.
        dtype: of activations, and of weights that are not quantised.

    Raises:
        ConfigError: weights cannot be held so, or the implementation named cannot run.
    """

    def implementations(storage: Mapping[str, Storage]) -> set[str]:
        return {
            _implementation(config, rules, dtype, form) for form in (None, *formats_of(storage))
        }

    if config.quantization == "auto":
        storage = stored(checkpoint, parameters, rules)
        # XLA would write the numbers out in every step, which costs more than to keep them.
        if storage and not implementations(storage) <= KERNELS:
            log.info(
                "the checkpoint's weights (%s) are held in %s: no kernel multiplies them here",
                ", ".join(map(str, formats_of(storage))), dtype.name,
            )  # fmt: skip
            storage = {}
    elif config.quantization == "none":
        storage = {}
    else:
        storage = named(config.quantization, parameters, rules)
    if config.activation_dtype == "int8" and not any(
        format.codes.startswith("int") for format in formats_of(storage)
    ):
        raise ConfigError(
            "activation_dtype int8 takes weights of integer codes: use --quantization int8 or int4"
        )
    found = implementations(storage)
    return (found.pop() if len(found) == 1 else "xla"), storage


def _implementation(
    config: EngineConfig, rules: ShardingRules, dtype: np.dtype, format: Format | None
) -> str:
    device = rules.mesh.devices.flat[0]
    try:
        return linear.choose_implementation(config.linear_implementation, device, dtype, format)
    except ValueError as error:
        raise ConfigError(str(error)) from error
