"""Fits a model to a mesh: which of its axes are split, and whether KV heads are repeated."""

import dataclasses
import logging

from jax.sharding import Mesh

from jaxserve.models.config import ModelConfig
from jaxserve.parallel.mesh import ShardingRules

log = logging.getLogger(__name__)


def shard_model(config: ModelConfig, mesh: Mesh) -> tuple[ModelConfig, ShardingRules]:
    """Fit a model to a mesh: which axes are split, and whether KV heads are repeated.

    With fewer KV heads than tensor shards each KV head is repeated, so that every shard has
    the one its query heads need; the model computes the same function. What still does not
    divide evenly is replicated, which costs memory and work but is never wrong.

    Returns:
        The config of the model as it runs (its `num_kv_heads` may have grown), and the rules.
    """
    tensor = mesh.shape["tensor"]
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if heads % tensor == 0 and kv_heads < tensor and tensor % kv_heads == 0:
        log.info("repeating %d KV heads for tensor=%d", kv_heads, tensor)
        config = dataclasses.replace(config, num_kv_heads=tensor)
    sizes = {
        "vocab": config.vocab_size,
        "mlp": config.intermediate_size,
        "kv_heads": config.num_kv_heads,
    }
    split = {axis for axis, size in sizes.items() if size % tensor == 0}
    for axis in sorted(sizes.keys() - split):
        log.warning(
            "%s: %d does not divide by tensor=%d, so these weights are replicated",
            axis, sizes[axis], tensor,
        )  # fmt: skip
    return config, ShardingRules(mesh, frozenset(split) if tensor > 1 else frozenset())
