"""Block sizes of the kernels: measured ones from tuning.json, or a heuristic.

The table has no entries yet: nobody has had a device to measure on. `scripts/tune_attention.py`
makes them. An entry's name is what `key` makes of a chip and a shape; its value is the fields of
`BlockSizes` for a TPU and those of `gpu_tiles.GpuTiles` for a GPU.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.kv_pages import SCALE_DTYPE, is_quantised
from pallas_kernels.tpu_layout import LANES, padded_to_lanes

TABLE = Path(__file__).with_name("tuning.json")
MEBIBYTE = 2**20
# Vector memory of one core by the beginning of the device's kind; the first match counts.
VMEM_MEBIBYTES = {
    "TPU v4": 16,
    "TPU v5 lite": 128,
    "TPU v5e": 128,
    "TPU v5": 64,
    "TPU v6": 128,
    "TPU7": 64,
}
DEFAULT_VMEM = 16  # of a chip that we do not know: the smallest of all


class Shape(NamedTuple):
    """What block sizes depend on, beside the chip; and whether a kernel can run at all.

    Attributes:
        heads, kv_heads, head_dim, page_size: of one shard.
        dtype: of the pool's values.
        query_dtype: of the queries; None: as the pool's. Block sizes do not depend on it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: Any
    query_dtype: Any = None


class BlockSizes(NamedTuple):
    """What one program and one turn of its loops work on.

    Attributes:
        query_tokens: query tokens of a program.
        pages_per_block: pages that are copied at once.
        pages_per_chunk: pages that are multiplied at once; divides pages_per_block.
    """

    query_tokens: int
    pages_per_block: int
    pages_per_chunk: int


def lookup(chip: str | None, shape: Shape) -> BlockSizes:
    """The block sizes to use.

    Args:
        chip: the device's kind; None if unknown.
        shape: the kernel's shape.

    Raises:
        ValueError: the table's entry makes no sense.
    """
    entry = None if chip is None else load_table().get(key(chip, shape))
    if entry is None:
        return heuristic(chip, shape)
    values = entry_values(key(chip or "", shape), entry, BlockSizes._fields)
    sizes = BlockSizes(**values)
    if sizes.pages_per_block % sizes.pages_per_chunk:
        raise ValueError(f"tuning.json, {key(chip or '', shape)!r}: {sizes} cannot be used")
    return sizes


def entry_values(name: str, entry: dict[str, int], fields: Sequence[str]) -> dict[str, int]:
    """An entry of the table, if it has the fields it should have and all are positive integers.

    Args:
        name: the entry's name.
        entry: its value.
        fields: names that it must have, and no others.

    Raises:
        ValueError: it has other fields or values.
    """
    if set(entry) != set(fields):
        raise ValueError(f"tuning.json, {name!r}: needs {', '.join(fields)}, has {sorted(entry)}")
    for field, value in entry.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"tuning.json, {name!r}: {field}={value!r} cannot be used")
    return entry


def key(chip: str, shape: Shape) -> str:
    """An entry's name: TPU v6 lite|heads=32|kv_heads=8|head_dim=128|page_size=16|bfloat16."""
    sizes = [f"{name}={getattr(shape, name)}" for name in shape._fields if "dtype" not in name]
    return "|".join([chip, *sizes, jnp.dtype(shape.dtype).name])


@functools.cache
def load_table() -> dict[str, dict[str, int]]:
    """The measured block sizes, by `key`."""
    return json.loads(TABLE.read_text())


def heuristic(chip: str | None, shape: Shape) -> BlockSizes:
    """Sizes that keep the copies large, the matrix unit's tiles full and vector memory whole.

    Args:
        chip, shape: as for `lookup`.
    """
    roomy = vmem_limit(chip) is not None
    group = shape.heads // shape.kv_heads
    # About 512 rows (token, group) of a query tile; 256 where memory is short.
    query_tokens = min(max(_power_of_two((512 if roomy else 256) // group), 16), 128)
    # K and V of one token in vector memory, where the last axis takes whole lanes.
    lanes = padded_to_lanes(shape.head_dim)
    token_bytes = 2 * shape.kv_heads * lanes * jnp.dtype(shape.dtype).itemsize
    block_tokens = min((2 if roomy else 1) * MEBIBYTE // token_bytes, 2048)
    pages_per_block = _power_of_two(block_tokens // shape.page_size)
    pages_per_chunk = min(pages_per_block, _power_of_two(512 // shape.page_size))
    sizes = BlockSizes(query_tokens, pages_per_block, pages_per_chunk)
    budget = (vmem_limit(chip) or DEFAULT_VMEM * MEBIBYTE) * 3 // 4
    while vmem_bytes(shape, sizes) > budget and sizes.query_tokens > 8:
        sizes = sizes._replace(query_tokens=sizes.query_tokens // 2)
    return sizes


def vmem_bytes(shape: Shape, sizes: BlockSizes) -> int:
    """Vector memory that a call takes, about: what it asks for, and its larger intermediates.

    Queries are counted as float32, and the log-sum-exp as asked for.
    """
    lanes = padded_to_lanes(shape.head_dim)
    itemsize = jnp.dtype(shape.dtype).itemsize
    heads = -(-shape.heads // 8) * 8
    rows = sizes.query_tokens * (shape.heads // shape.kv_heads)
    block = 4 * shape.kv_heads * sizes.pages_per_block * shape.page_size * lanes * itemsize
    if is_quantised(shape.dtype):  # a page's scales: heads in whole sublanes, slots in whole lanes
        page = -(-shape.kv_heads // 8) * 8 * padded_to_lanes(shape.page_size)
        block += 4 * sizes.pages_per_block * page * SCALE_DTYPE.itemsize
    blocks = 4 * sizes.query_tokens * heads * (3 * lanes + 2 * LANES)  # two of q, two of out
    blocks += 4 * sizes.query_tokens * heads * 2 * lanes
    tile = 4 * shape.kv_heads * rows * (2 * lanes + 2 * LANES)
    scores = 3 * 4 * rows * sizes.pages_per_chunk * shape.page_size
    return block + blocks + tile + scores


def vmem_limit(chip: str | None) -> int | None:
    """Bytes of vector memory that a call may ask for; None is the compiler's own limit.

    Half of what the chip has: XLA keeps weights for the next operation in the rest. The
    compiler's own limit, 16 MiB, is all that a v4 has.
    """
    known = [size for name, size in VMEM_MEBIBYTES.items() if (chip or "").startswith(name)]
    half = (known[0] if known else DEFAULT_VMEM) // 2
    return half * MEBIBYTE if half > DEFAULT_VMEM else None


def _power_of_two(number: int) -> int:
    """The largest power of two that is not above `number`; 1 at least."""
    return 1 << max(number.bit_length() - 1, 0) if number > 0 else 1
