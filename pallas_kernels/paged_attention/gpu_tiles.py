"""What the Hopper kernels share: block sizes, pages fetched as tiles, and scores."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.jax_compat import load_ref
from pallas_kernels.paged_attention import tuning

LOG2E = math.log2(math.e)

# What WGMMA reads and TMA writes: rows of 128 bytes, eight to a swizzle pattern.
OPERAND = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


# Of the prefill kernel, beside the fetching one: they take 232 registers a thread, and a third
# would wait for ever for its share of the multiprocessor's 65536.
MAX_WARPGROUPS = 2


@dataclasses.dataclass(frozen=True)
class GpuTiles:
    """Block sizes of the kernels; every field only moves work about, none changes results.

    Attributes:
        decode_blocks: thread blocks of the decode kernel.
        decode_tile: positions of K and V per turn of its loop, a multiple of 64.
        decode_stages: tiles in flight.
        decode_share: the least number of tiles that is worth a thread block of its own.
        prefill_blocks: thread blocks of the prefill kernel.
        prefill_tile: positions per turn, 64 or 128.
        prefill_stages: tiles in flight.
        prefill_warpgroups: of 64 query rows (tokens times heads of a group) each; 1 or 2.
    """

    decode_blocks: int
    decode_tile: int
    decode_stages: int
    decode_share: int
    prefill_blocks: int
    prefill_tile: int
    prefill_stages: int
    prefill_warpgroups: int


def gpu_tiles(head_dim: int, num_cores: int) -> GpuTiles:
    """Block sizes for a head size, on a GPU of so many multiprocessors (Hopper's 227 KiB each).

    Decode wants bytes in flight: about 64 KiB per multiprocessor hide the memory's latency, in
    two or three blocks so that one multiplies while another waits. Prefill wants every tile of
    K and V read by 128 query rows; at head size 256 only 64 fit beside two tiles.
    """
    wide = head_dim > 128
    return GpuTiles(
        decode_blocks=num_cores * (1 if wide else 2 if head_dim > 64 else 3),
        decode_tile=64,
        decode_stages=3 if head_dim > 64 else 4,
        decode_share=4,
        prefill_blocks=num_cores,
        prefill_tile=64,
        prefill_stages=2 if wide else 3,
        prefill_warpgroups=1 if wide else 2,
    )


def lookup_tiles(chip: str | None, num_cores: int, shape: tuning.Shape) -> GpuTiles:
    """The block sizes to use: measured ones from tuning.json, or those of `gpu_tiles`.

    Args:
        chip: the device's kind; None if unknown.
        num_cores: its multiprocessors.
        shape: the kernel's shape.

    Raises:
        ValueError: the table's entry makes no sense.
    """
    entry = None if chip is None else tuning.load_table().get(tuning.key(chip, shape))
    if entry is None:
        return gpu_tiles(shape.head_dim, num_cores)
    name = tuning.key(chip or "", shape)
    fields = [field.name for field in dataclasses.fields(GpuTiles)]
    tiles = GpuTiles(**tuning.entry_values(name, entry, fields))
    fits = tiles.prefill_tile in (64, 128) and tiles.prefill_warpgroups <= MAX_WARPGROUPS
    if tiles.decode_tile % 64 or not fits:
        raise ValueError(f"tuning.json, {name!r}: {tiles} cannot be used")
    return tiles


@dataclasses.dataclass(frozen=True)
class Attention:
    """The constants of one call, and the scores they make of products.

    Attributes:
        pages: pages of one layer.
        kv_heads: KV heads.
        group: query heads of one KV head.
        page_size: positions of a page.
        head_dim: size of a head.
        scale: what q.k is multiplied by.
        sliding_window: positions a token sees, or None.
        soft_cap: or None.
    """

    pages: int
    kv_heads: int
    group: int
    page_size: int
    head_dim: int
    scale: float
    sliding_window: int | None
    soft_cap: float | None

    def log2_scores(self, products: jax.Array) -> jax.Array:
        """Scaled and capped scores in units of log 2, as exp2 is what the hardware has.

        The cap's tanh is built from exp2: the hardware's own tanh is good to 11 bits only.
        """
        if self.soft_cap is None:
            return products * (self.scale * LOG2E)
        e = jnp.exp2(products * (2 * self.scale * LOG2E / self.soft_cap))
        return (self.soft_cap * LOG2E) * (1.0 - 2.0 / (e + 1.0))

    def first_tile_position(self, first_seen: jax.Array, tile: int) -> jax.Array:
        """Where the tiles begin of a token that sees nothing before `first_seen`.

        At the border of a page, or of a tile inside one: a page wholly before it is not read.
        """
        unit = min(self.page_size, tile)
        return lax.div(first_seen, jnp.int32(unit)) * unit

    def pages_of_tile(self, position: jax.Array, table_ref: Any, row: Any, last: Any, tile: int):
        """Page indices of the tile at a position, none behind page `last` of the row.

        What lies behind the context in the page table is garbage; the last page is read
        again in its place, and masked.
        """
        first = lax.div(position, jnp.int32(self.page_size))
        return tuple(
            table_ref[row, jnp.minimum(first + i, last)]
            for i in range(max(1, tile // self.page_size))
        )

    def copy_tile(
        self, pool_ref: Any, pages: tuple, kind: int, head: Any, position: Any, layer: Any,
        smem: Any, barrier: Any,
    ) -> None:  # fmt: skip
        """Starts the copies of one tile of K (kind 0) or V (1): one per page, all by TMA.

        Args:
            pool_ref: [layers * pages * 2 * kv_heads, page_size, head_dim].
            pages: from `pages_of_tile`.
            kind: 0 for K, 1 for V.
            head: KV head.
            position: of the tile's first row.
            layer: the pool's layer.
            smem: [tile, head_dim].
            barrier: gets one arrival per page.
        """
        rows = min(self.page_size, smem.shape[0])
        offset = lax.rem(position, jnp.int32(self.page_size)) if self.page_size > rows else 0
        for i, page in enumerate(pages):
            source = ((layer * self.pages + page) * 2 + kind) * self.kv_heads + head
            plgpu.copy_gmem_to_smem(
                pool_ref.at[source, pl.ds(offset, rows)], smem.at[pl.ds(i * rows, rows)], barrier
            )


def zero_rows_from(smem: Any, first: jax.Array) -> None:
    """Zeroes the rows of a [tile, head_dim] operand from row `first` on.

    Slots that no token was written to may hold NaN, and 0 * NaN is NaN: weights of zero do not
    keep such rows out of a product.
    """
    size, width = smem.shape[0], 64  # few columns at a time: registers are full of the output
    for column in range(0, smem.shape[1], width):
        part = smem.at[:, pl.ds(column, width)]
        values = load_ref(part, plgpu.Layout.WGMMA)
        row = plgpu.broadcasted_iota(jnp.int32, (size, width), 0, layout=plgpu.Layout.WGMMA)
        part[...] = jnp.where(row < first, values, jnp.zeros_like(values))
    plgpu.commit_smem()


def product(a: Any, b: Any) -> jax.Array:
    """a @ b of two operands in shared memory, float32 [a rows, b columns] in registers."""

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def filled(shape: tuple[int, ...], value: float, axis: int | None = None) -> jax.Array:
    """A float32 constant laid out as a product is, or as one is reduced over an axis."""
    layout = plgpu.Layout.WGMMA if axis is None else plgpu.Layout.WGMMA.reduce(axis)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def along(vector: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A vector broadcast to a matrix whose given axis it indexes."""
    return lax.broadcast_in_dim(vector, shape, [axis])
