"""The XLA programs that move whole KV pages: out of the pool, into it, and within it.

Each is a loop over pages. XLA:CPU gathers sixteen pages of SmolLM2 element by element, in 82 ms
where a loop of slices takes 21 ms, most of which is the kernel handing out fresh memory; a loop
stops after the pages there really are, so that one program serves any number up to its size; and
what it keeps beside the pool is at most one page.

The functions see one data shard's part of the pool and one device's heads, under `jax.shard_map`.
"""

import jax
import jax.numpy as jnp
from jax import lax

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


def gather_pages(kv_pages: jax.Array, pages: jax.Array) -> jax.Array:
    """Read pages.

    Args:
        kv_pages: [layers, pages, 2, kv_heads, page_size, head_dim].
        pages: int32 [1, n]: the pages to read, then numbers out of range.

    Returns:
        [1, n, layers, 2, kv_heads, page_size, head_dim]; zeros where the number was out of range.
    """

    def one(i: jax.Array, out: jax.Array) -> jax.Array:
        content = lax.dynamic_index_in_dim(kv_pages, pages[0, i], axis=1, keepdims=False)
        return lax.dynamic_update_index_in_dim(out, content[None], i, axis=1)

    # The shape of the result from the start: XLA:CPU copies what is reshaped behind the loop.
    layers, _, *rest = kv_pages.shape
    out = jnp.zeros((1, pages.shape[1], layers, *rest), kv_pages.dtype)
    return lax.fori_loop(0, _count(kv_pages, pages[0]), one, out)


def scatter_pages(kv_pages: jax.Array, pages: jax.Array, contents: jax.Array) -> jax.Array:
    """Fill pages; in place when `kv_pages` is donated.

    Args:
        kv_pages: [layers, pages, 2, kv_heads, page_size, head_dim].
        pages: int32 [1, n]: the pages to fill, then numbers out of range.
        contents: [1, n, layers, 2, kv_heads, page_size, head_dim].
    """

    def one(i: jax.Array, pool: jax.Array) -> jax.Array:
        content = lax.dynamic_index_in_dim(contents[0], i, axis=0, keepdims=False)
        return lax.dynamic_update_index_in_dim(pool, content, pages[0, i], axis=1)

    return lax.fori_loop(0, _count(kv_pages, pages[0]), one, kv_pages)


def copy_pages(kv_pages: jax.Array, moves: jax.Array) -> jax.Array:
    """Copy pages to other pages, one after the other; in place when `kv_pages` is donated.

    Args:
        kv_pages: [layers, pages, 2, kv_heads, page_size, head_dim].
        moves: int32 [1, 2, n], sources and targets; after the last one, targets out of range.
    """

    def one(i: jax.Array, pool: jax.Array) -> jax.Array:
        content = lax.dynamic_index_in_dim(pool, moves[0, 0, i], axis=1, keepdims=False)
        return lax.dynamic_update_index_in_dim(pool, content, moves[0, 1, i], axis=1)

    return lax.fori_loop(0, _count(kv_pages, moves[0, 1]), one, kv_pages)


def _count(kv_pages: jax.Array, pages: jax.Array) -> jax.Array:
    """How many of the page numbers are in range; they come first."""
    return jnp.sum(pages < kv_pages.shape[1], dtype=jnp.int32)
