"""Writing K and V rows into their pages on TPUs (Pallas, Mosaic TPU).

A page's last two axes lie in memory in tiles of 8 (float32), 16 (bfloat16) or 32 (8 bits) rows,
two or four rows to a 32-bit word where they are narrow, so that no copy can move one row. What
can be moved is a tile's worth of slots, `[2, kv_heads, slots, head_dim]`. Each one that the step
touches has one owner, a work item: it reads the old slots, puts the new rows among them and
writes them back. Tiles of which every slot is new are not read. Items do not meet, since a page
that is written belongs to one row, so several are in flight at once, reads ahead of the one that
is merged and writes behind it.

Of a quantised pool the tiles are of codes. Scales, a tile of which is a page's of all heads, are
merged page by page in XLA.

A decode row moves 2 * 16 rows per KV head to write one. That is the price of the tiling, and
small next to the thousands that attention then reads.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv_pages import KvPages, KvPool, is_joined, quantise
from pallas_kernels.paged_batch import PagedBatch
from pallas_kernels.tpu_layout import tile_rows

RING = 8  # items in flight: half of them being read, half being written


class _Items(NamedTuple):
    """Tiles of slots to write: int32 [items], of which the first count[0] are real.

    Attributes:
        call: int32 [2]: layer, number of items.
        page: the page.
        tile: which tile of the page.
        token: the first new token.
        slot: the slot of the tile that it goes to.
        size: new tokens.
    """

    call: Any
    page: Any
    tile: Any
    token: Any
    slot: Any
    size: Any


def kv_write(
    kv_pages: KvPool,
    k: jax.Array,
    v: jax.Array,
    batch: PagedBatch,
    *,
    layer: int | jax.Array,
    interpret: bool | pltpu.InterpretParams = False,
) -> KvPool:
    """`pallas_kernels.kv_write.kv_write` as a Pallas kernel for TPUs.

    Args:
        interpret: run in the TPU interpreter, on any platform.

    Raises:
        ValueError: pages are not whole tiles.
    """
    if isinstance(kv_pages, KvPages):
        return _write_quantised(kv_pages, k, v, batch, layer, interpret)
    _, _, parts, kv_heads, page_size, width = kv_pages.shape
    slots = tile_rows(kv_pages.dtype)
    if page_size % slots:
        raise ValueError(
            f"the TPU kernel writes tiles of {slots} slots of {kv_pages.dtype}; a page of "
            f"{page_size} slots is not made of them"
        )
    new = [k.astype(kv_pages.dtype), v.astype(kv_pages.dtype)]
    if is_joined(kv_pages):
        new = [jnp.concatenate(new, axis=-1)]
    window = min(slots, k.shape[0])
    items = _find_items(batch, layer, k.shape[0], page_size, slots)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    tile = (RING, parts, kv_heads, slots, width)
    return pl.pallas_call(
        functools.partial(_kernel, window=window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items),
            grid=(1,),
            in_specs=[anywhere] * (parts + 1),
            out_specs=anywhere,
            scratch_shapes=[
                pltpu.VMEM(tile, kv_pages.dtype),
                pltpu.VMEM((RING, parts, 2 * slots + window, kv_heads, width), kv_pages.dtype),
                pltpu.SemaphoreType.DMA((2, RING)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),
        input_output_aliases={len(items) + parts: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="kv_write",
    )(*items, *new, kv_pages)


def _write_quantised(
    kv_pages: KvPages,
    k: jax.Array,
    v: jax.Array,
    batch: PagedBatch,
    layer: int | jax.Array,
    interpret: bool | pltpu.InterpretParams,
) -> KvPages:
    """`kv_write` of a pool with scales."""
    page_size = kv_pages.shape[4]
    # [2, tokens, kv_heads, head_dim] and [2, tokens, kv_heads]
    codes, scales = quantise(jnp.stack([k, v]), kv_pages.values.dtype)
    values = kv_write(kv_pages.values, codes[0], codes[1], batch, layer=layer, interpret=interpret)
    assert isinstance(values, jax.Array)
    pages = _find_items(batch, layer, k.shape[0], page_size, page_size)
    number = jnp.where(jnp.arange(len(pages.page)) < pages.call[1], pages.page, kv_pages.shape[1])
    slot = jnp.arange(page_size) - pages.slot[:, None]  # [pages, page_size], from the first new
    token = jnp.clip(pages.token[:, None] + slot, 0, k.shape[0] - 1)
    new = jnp.moveaxis(scales[:, token], (1, 3), (0, 2))  # [pages, 2, kv_heads, page_size]
    old = kv_pages.scales.at[layer, number].get(mode="clip")
    mine = (slot >= 0) & (slot < pages.size[:, None])
    merged = jnp.where(mine[:, None, None], new, old)
    written = kv_pages.scales.at[layer, number].set(merged, mode="drop")
    return KvPages(values, written)


def _find_items(
    batch: PagedBatch, layer: int | jax.Array, num_tokens: int, page_size: int, slots: int
) -> _Items:
    """The tiles that the batch touches, in the order of their tokens."""
    rows = batch.query_len.shape[0]
    most = min(num_tokens, num_tokens // slots + 2 * rows)
    first = batch.context_len - batch.query_len  # position of a row's first new token
    count = (batch.context_len - 1) // slots - first // slots + 1
    count = jnp.where(batch.query_len > 0, count, 0)
    until = jnp.cumsum(count)
    item = jnp.arange(most, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(until <= item[:, None], axis=1, dtype=jnp.int32), rows - 1)
    tile = first[row] // slots + item - (until - count)[row]
    begin = jnp.maximum(tile * slots, first[row])
    end = jnp.minimum((tile + 1) * slots, batch.context_len[row])
    page = batch.page_table.at[row, tile * slots // page_size].get(mode="clip")
    call = jnp.stack([jnp.asarray(layer, jnp.int32), until[-1].astype(jnp.int32)])
    token = batch.query_start[row] + begin - first[row]
    return _Items(call, page, tile % (page_size // slots), token, begin - tile * slots, end - begin)


def _kernel(*refs: Any, window: int) -> None:
    items = _Items(*refs[:6])
    *new, _, pool, tiles, fresh, semaphores = refs[6:]
    num_tokens, slots = new[0].shape[0], tiles.shape[3]
    num_items = items.call[1]

    def home(item: jax.Array) -> Any:
        """The item's slots in the pool."""
        start = pl.multiple_of(items.tile[item] * slots, slots)
        return pool.at[items.call[0], items.page[item], :, :, pl.ds(start, slots)]

    def first_copied(item: jax.Array) -> jax.Array:
        """The first token that is copied: what lands in slot 0, as far as there are tokens."""
        first = jnp.clip(items.token[item] - items.slot[item], 0, num_tokens - window)
        return jnp.where(items.size[item] == 1, items.token[item], first)

    def each_read(item: jax.Array, act: Any) -> None:
        ring = lax.rem(item, RING)
        semaphore = semaphores.at[0, ring]

        def rows(width: int) -> None:
            source = pl.ds(first_copied(item), width)
            for part, one in enumerate(new):
                target = fresh.at[ring, part, pl.ds(slots, width)]
                act(pltpu.make_async_copy(one.at[source], target, semaphore))

        @pl.when(items.size[item] < slots)
        def _() -> None:
            act(pltpu.make_async_copy(home(item), tiles.at[ring], semaphore))

        pl.when(items.size[item] == 1)(lambda: rows(1))
        pl.when(items.size[item] != 1)(lambda: rows(window))

    def write(item: jax.Array) -> Any:
        ring = lax.rem(item, RING)
        return pltpu.make_async_copy(tiles.at[ring], home(item), semaphores.at[1, ring])

    def merge(item: jax.Array) -> None:
        ring = lax.rem(item, RING)
        start = slots + items.token[item] - items.slot[item] - first_copied(item)
        slot = lax.broadcasted_iota(jnp.int32, tiles.shape[2:], 1) - items.slot[item]
        mine = (slot >= 0) & (slot < items.size[item])
        for part in range(len(new)):
            written = fresh[ring, part, pl.ds(start, slots)].astype(jnp.float32).swapaxes(0, 1)
            merged = jnp.where(mine, written, tiles[ring, part].astype(jnp.float32))
            if tiles.dtype == jnp.int8:
                merged = merged.astype(jnp.int32)
            tiles[ring, part] = merged.astype(tiles.dtype)

    def start_read(item: jax.Array) -> None:
        # Its place in the ring is free once the item that had it before is written.
        pl.when(item >= RING)(lambda: write(item - RING).wait())
        each_read(item, lambda copy: copy.start())

    def one(item: jax.Array, _: None) -> None:
        ahead = item + RING // 2
        pl.when(ahead < num_items)(lambda: start_read(ahead))
        each_read(item, lambda copy: copy.wait())
        merge(item)
        write(item).start()

    def drain(item: jax.Array, _: None) -> None:
        write(item).wait()

    lax.fori_loop(0, jnp.minimum(num_items, RING // 2), lambda i, _: start_read(i), None)
    lax.fori_loop(0, num_items, one, None)
    lax.fori_loop(jnp.maximum(num_items - RING, 0), num_items, drain, None)
