"""The XLA programs that move whole KV pages: out of the pool, into it, and within it.

Each is a loop over pages. XLA:CPU gathers sixteen pages of SmolLM2 element by element, in 82 ms
where a loop of slices takes 21 ms, most of which is the kernel handing out fresh memory; a loop
stops after the pages there really are, so that one program serves any number up to its size; and
what it keeps beside the pool is at most one page.

The functions see one data shard's part of the pool and one device's heads, under `jax.shard_map`.
What they say of values goes for scales as well, whose arrays have no head_dim.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_pages import KvPool

PIECES = (1, 4, 16)  # pages moved by one program; larger sets go in pieces
# A piece is made anew every time. Above this, glibc asks the kernel for fresh memory, which took
# four times as long as the copy; and links to other devices are busy with far less.
PIECE_BYTES = 32 * 2**20
COPIES = 16  # page copies of one program, at most


def piece_sizes(page_bytes: int) -> tuple[int, ...]:
    """The numbers of pages, ascending from 1, that are worth a program each.

    Args:
        page_bytes: what one page takes on one device.
    """
    return tuple(n for n in PIECES if n == 1 or n * page_bytes <= PIECE_BYTES)


def gather_pages(kv_pages: KvPool, pages: jax.Array) -> KvPool:
    """Read pages.

    Args:
        kv_pages: [layers, pages, 2, kv_heads, page_size, head_dim].
        pages: int32 [1, n]: the pages to read, then numbers out of range.

    Returns:
        [1, n, layers, 2, kv_heads, page_size, head_dim]; zeros where the number was out of range.
    """

    # The shape of the result from the start: XLA:CPU copies what is reshaped behind the loop.
    def empty(array: jax.Array) -> jax.Array:
        layers, _, *rest = array.shape
        return jnp.zeros((1, pages.shape[1], layers, *rest), array.dtype)

    def one(i: jax.Array, out: KvPool) -> KvPool:
        def put(out: jax.Array, array: jax.Array) -> jax.Array:
            return lax.dynamic_update_index_in_dim(out, _page(array, pages[0, i])[None], i, axis=1)

        return jax.tree.map(put, out, kv_pages)

    out = jax.tree.map(empty, kv_pages)
    return lax.fori_loop(0, _count(kv_pages, pages[0]), one, out)


def scatter_pages(kv_pages: KvPool, pages: jax.Array, contents: KvPool) -> KvPool:
    """Fill pages; in place when `kv_pages` is donated.

    Args:
        kv_pages: [layers, pages, 2, kv_heads, page_size, head_dim].
        pages: int32 [1, n]: the pages to fill, then numbers out of range.
        contents: [1, n, layers, 2, kv_heads, page_size, head_dim].
    """

    def one(i: jax.Array, pool: KvPool) -> KvPool:
        def put(array: jax.Array, contents: jax.Array) -> jax.Array:
            content = lax.dynamic_index_in_dim(contents[0], i, axis=0, keepdims=False)
            return lax.dynamic_update_index_in_dim(array, content, pages[0, i], axis=1)

        return jax.tree.map(put, pool, contents)

    return lax.fori_loop(0, _count(kv_pages, pages[0]), one, kv_pages)


def copy_pages(kv_pages: KvPool, moves: jax.Array) -> KvPool:
    """Copy pages to other pages, one after the other; in place when `kv_pages` is donated.

    Args:
        kv_pages: [layers, pages, 2, kv_heads, page_size, head_dim].
        moves: int32 [1, 2, n], sources and targets; after the last one, targets out of range.
    """

    def copied(array: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(array, _page(array, source), target, axis=1)

    def one(i: jax.Array, pool: KvPool) -> KvPool:
        return jax.tree.map(partial(copied, source=moves[0, 0, i], target=moves[0, 1, i]), pool)

    return lax.fori_loop(0, _count(kv_pages, moves[0, 1]), one, kv_pages)


def _page(array: jax.Array, page: jax.Array) -> jax.Array:
    """One page of all layers."""
    return lax.dynamic_index_in_dim(array, page, axis=1, keepdims=False)


def _count(kv_pages: KvPool, pages: jax.Array) -> jax.Array:
    """How many of the page numbers are in range; they come first."""
    return jnp.sum(pages < kv_pages.shape[1], dtype=jnp.int32)
