"""How each weight of a model is held: as an array, or quantised in which format."""

import logging
from collections.abc import Iterable, Mapping

from jaxserve.checkpoints.base import Checkpoint
from jaxserve.core.errors import ConfigError
from jaxserve.models.parameters import Parameter
from jaxserve.models.weights import DENSE, Storage
from jaxserve.parallel.mesh import ShardingRules
from pallas_kernels.weights import Format

log = logging.getLogger(__name__)

# What `--quantization` makes of floating weights. Groups of 32 are what files of 4 bits have.
NAMED = {
    "int8": Format("int8"),
    "int4": Format("int4", 32, "float16"),
    "fp8": Format("fp8"),
}
# Embedding and head lose most by few bits, and are a small part of most models.
_TABLES = {"int4": NAMED["int8"]}


def stored(
    checkpoint: Checkpoint, parameters: Mapping[str, Parameter], rules: ShardingRules | None = None
) -> dict[str, Storage]:
    """How to hold weights just as a checkpoint has them; those left out are arrays.

    Parts of one format are held as one. A weight whose groups a mesh would cut becomes an array,
    which the log says.

    Args:
        checkpoint: where they come from.
        parameters: the model's, as it runs.
        rules: the mesh; None: there is none, and nothing is cut.
    """
    found: dict[str, Storage] = {}
    cut: list[str] = []
    for name, parameter in _weights(parameters):
        formats = checkpoint.formats(name)
        storage: Storage = formats if len(set(formats)) > 1 else formats[:1]
        if storage == DENSE:
            continue
        if any(format and _refusal(format, parameter, rules) for format in storage):
            cut.append(name)
        else:
            found[name] = storage
    if cut:
        log.warning(
            "%d weights, such as %s, are held as arrays: over this mesh their groups would be cut",
            len(cut), cut[0],
        )  # fmt: skip
    return found


def named(
    name: str, parameters: Mapping[str, Parameter], rules: ShardingRules | None = None
) -> dict[str, Storage]:
    """How to hold all weights in one of the formats `NAMED`; int4 leaves tables in int8.

    Args:
        name: of the format.
        parameters: the model's, as it runs.
        rules: the mesh; None: there is none.

    Raises:
        ConfigError: a weight has no such groups, or the mesh would cut them.
    """
    found: dict[str, Storage] = {}
    for weight, parameter in _weights(parameters):
        is_table = parameter.axes[0] == "vocab"
        format = _TABLES.get(name, NAMED[name]) if is_table else NAMED[name]
        if reason := _refusal(format, parameter, rules):
            raise ConfigError(f"quantization {name} cannot hold {weight}: {reason}")
        found[weight] = (format,)
    return found


def formats_of(storage: Mapping[str, Storage]) -> list[Format]:
    """The formats that weights are held in, each once, in a fixed order."""
    found = {format for one in storage.values() for format in one if format is not None}
    return sorted(found, key=str)


def _weights(parameters: Mapping[str, Parameter]) -> Iterable[tuple[str, Parameter]]:
    return ((name, one) for name, one in parameters.items() if one.kind == "weight")


def _refusal(format: Format, parameter: Parameter, rules: ShardingRules | None) -> str | None:
    """Why a weight cannot be held in a format on a mesh; None if it can."""
    shards = rules.tensor if rules and parameter.axes[-1] in rules.split else 1
    try:
        format.check_inputs(parameter.shape[-1], shards)
    except ValueError as error:
        return str(error)
    return None
