"""A model's structure apart from its weights, which are a flat dict by dotted name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from flax import nnx

from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.registry import family_of
from jaxserve.models.weights import DENSE, Storage, Weight, abstract_weight
from jaxserve.parallel.mesh import ShardingRules

Params = Mapping[str, Weight]


class ModelGraph:
    """The structure of a model.

    Args:
        config: the architecture, fitted to a mesh (`shard_model`).

    Attributes:
        config: the architecture.
        parameters: every parameter's declaration by its dotted name.
    """

    def __init__(self, config: ModelConfig) -> None:
        family = family_of(config)
        self.config = config
        self.parameters = family.parameters(config)
        model = Decoder(config, family.layer, self.parameters)
        self._graphdef, self._state = nnx.split(model)

    def abstract_params(
        self,
        rules: ShardingRules,
        dtype: np.dtype,
        storage: Mapping[str, Storage] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Shapes, types and placements of every parameter on a mesh: a `Weight` by name.

        Args:
            rules: the mesh.
            dtype: of arrays.
            storage: how parameters are held that are not one array each.
        """
        return {
            name: abstract_weight(one, storage.get(name, DENSE), rules, dtype)
            for name, one in self.parameters.items()
        }

    def layers(self, first: int, last: int) -> "ModelGraph":
        """The structure with the layers from `first` up to, but without, `last`, numbered anew."""
        return ModelGraph(self.config.layers(first, last))

    def model(self, params: Params) -> Decoder:
        """The model with these weights in it.

        A parameter left out keeps its abstract shape and must not be used.
        """
        flat = [
            (path, variable.replace(params.get(".".join(map(str, path)), variable.get_value())))
            for path, variable in nnx.to_flat_state(self._state)
        ]
        return nnx.merge(self._graphdef, nnx.from_flat_state(flat))

    @property
    def final_names(self) -> tuple[str, ...]:
        """Names of the parameters that the last hidden states are normed by."""
        return tuple(n for n in ("final_norm", "final_norm_bias") if n in self.parameters)

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the parameters that the sampler's program uses."""
        head = "embed" if self.config.tie_embeddings else "lm_head"
        return (*self.final_names, head)
