"""What a page of the KV pool takes on a device."""

import numpy as np

from jaxserve.models.config import ModelConfig
from jaxserve.parallel.mesh import ShardingRules
from pallas_kernels.kv_pages import SCALE_DTYPE, is_quantised, kv_token_bytes, pool_parts
from pallas_kernels.tpu_layout import LANES, padded_to_lanes, tile_rows


def joins_kv(config: ModelConfig, rules: ShardingRules) -> bool:
    """Whether K and V of a token lie side by side in the pool (`kv_pages.pool_parts`).

    They do on a TPU where they fill its lanes together, and neither does alone.
    """
    return is_tpu(rules) and 2 * config.head_dim <= LANES


def is_tpu(rules: ShardingRules) -> bool:
    """Whether a mesh is made of TPUs."""
    return rules.mesh.devices.flat[0].platform == "tpu"


def page_bytes(
    config: ModelConfig, rules: ShardingRules, kv_dtype: np.dtype, page_size: int
) -> int:
    """Bytes of one page, all layers, on each of its shard's devices: values, and their scales.

    A TPU pads the last axis of an array to whole lanes, and the one before it to whole tiles.

    Args:
        config: the model, fitted to the mesh.
        rules: the mesh.
        kv_dtype: of the values in the pool.
        page_size: tokens per page.
    """
    kv_heads = config.num_kv_heads // rules.head_parts
    if not is_tpu(rules):
        head_bytes = page_size * kv_token_bytes(kv_dtype, config.head_dim)
        return 2 * config.num_layers * kv_heads * head_bytes
    parts, width = pool_parts(config.head_dim, joined=joins_kv(config, rules))
    values = parts * kv_heads * page_size * padded_to_lanes(width) * kv_dtype.itemsize
    scales = 0
    if is_quantised(kv_dtype):
        tile = tile_rows(SCALE_DTYPE)
        padded_heads = -(-kv_heads // tile) * tile
        scales = 2 * padded_heads * padded_to_lanes(page_size) * SCALE_DTYPE.itemsize
    return config.num_layers * (values + scales)
