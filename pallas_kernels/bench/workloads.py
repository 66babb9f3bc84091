"""What is timed: batches of real serving, their inputs, and the work they cannot do without."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_pages import KvPages, KvPool, is_quantised, kv_token_bytes, quantise
from pallas_kernels.paged_attention import Shape
from pallas_kernels.paged_batch import PagedBatch, pool_format

NAMES = ("decode", "prefill", "mixed", "kv_write")
BATCH = {"decode": 64, "prefill": 4, "mixed": 32, "kv_write": 32}  # rows, the chunk aside
CHUNK = 512  # query tokens of the prefill chunk in a mixed step
CONTEXT = 4096


class Workload(NamedTuple):
    """One call's batch.

    Attributes:
        name: one of NAMES.
        rows: (query_len, context_len) of every row.
    """

    name: str
    rows: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        """Query tokens of all rows."""
        return sum(query for query, _ in self.rows)


class Work(NamedTuple):
    """What a call must do, however it is implemented.

    Attributes:
        bytes: to read and write, each once.
        flops: of the two products of attention; a multiplication and an addition are two.
    """

    bytes: int
    flops: int

    def bound(self, bandwidth: float, rate: float) -> tuple[float, str]:
        """Seconds that it takes at least, and what of: "memory" or "compute".

        Args:
            bandwidth: bytes per second.
            rate: FLOPs per second.
        """
        return max((self.bytes / bandwidth, "memory"), (self.flops / rate, "compute"))


class Inputs(NamedTuple):
    """Live arrays of a workload on the default device.

    Attributes:
        q: [tokens, heads, head_dim].
        k, v: [tokens, kv_heads, head_dim], for kv_write.
        kv_pages: [1, pages, 2, kv_heads, page_size, head_dim], and scales of quantised ones.
        batch: its rows, on shuffled pages.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    kv_pages: KvPool
    batch: PagedBatch


def make_workload(name: str, batch: int | None = None, context: int | None = None) -> Workload:
    """A workload by its name.

    Args:
        name: decode: rows of one token; prefill: whole prompts; mixed and kv_write: decode rows
            and the last CHUNK tokens of one prompt.
        batch: rows (of a mixed step without the chunk); None is what BATCH says.
        context: tokens of every row's context; None is CONTEXT.
    """
    batch = BATCH[name] if batch is None else batch
    context = CONTEXT if context is None else context
    if batch < 1 or context < 1:
        raise ValueError(f"batch {batch} and context {context} must be positive")
    if name == "prefill":
        return Workload(name, ((context, context),) * batch)
    decodes = ((1, context),) * batch
    if name == "decode":
        return Workload(name, decodes)
    return Workload(name, (*decodes, (min(CHUNK, context), context)))


def work_of(workload: Workload, shape: Shape) -> Work:
    """Bytes and FLOPs that a workload needs.

    Attention reads q and every row's K and V, and writes its output; a token is multiplied with
    the positions it sees, and no others. kv_write reads new K and V and writes them.

    Args:
        workload: the batch.
        shape: of queries and pool.
    """
    itemsize = _query_dtype(shape).itemsize
    kv_token = 2 * shape.kv_heads * kv_token_bytes(shape.dtype, shape.head_dim)
    if workload.name == "kv_write":
        new = 2 * shape.kv_heads * shape.head_dim * itemsize
        return Work(workload.num_tokens * (new + kv_token), 0)
    contexts = sum(context for _, context in workload.rows)
    queries = 2 * workload.num_tokens * shape.heads * shape.head_dim * itemsize
    seen = sum(
        query * (context - query) + query * (query + 1) // 2 for query, context in workload.rows
    )
    return Work(queries + contexts * kv_token, 4 * shape.heads * shape.head_dim * seen)


def make_inputs(workload: Workload, shape: Shape, seed: int = 0) -> Inputs:
    """Random inputs: a chip multiplies zeros faster, and pages in order are read faster.

    Args:
        workload: the batch.
        shape: of queries and pool.
        seed: of all that is drawn.
    """
    counts = [-(-context // shape.page_size) for _, context in workload.rows]
    pages = np.random.default_rng(seed).permutation(sum(counts)).astype(np.int32)
    table = np.zeros((len(counts), max(counts)), np.int32)
    for row, own in enumerate(np.split(pages, np.cumsum(counts)[:-1])):
        table[row, : len(own)] = own
    query_len, context_len = np.array(workload.rows, np.int32).T
    start = (np.cumsum(query_len) - query_len).astype(np.int32)
    batch = PagedBatch(*(jnp.asarray(x) for x in (start, query_len, context_len, table)))

    keys = jax.random.split(jax.random.key(seed), 4)
    tokens, size = workload.num_tokens, shape.head_dim

    def draw(key: Any, *dims: int) -> jax.Array:
        return jax.random.normal(key, dims, _query_dtype(shape))

    numbers = draw(keys[0], 1, len(pages), 2, shape.kv_heads, shape.page_size, size)
    if is_quantised(shape.dtype):
        pool: KvPool = KvPages(*quantise(numbers, shape.dtype))
    else:
        pool = numbers.astype(shape.dtype)
    return Inputs(
        q=draw(keys[1], tokens, shape.heads, size),
        k=draw(keys[2], tokens, shape.kv_heads, size),
        v=draw(keys[3], tokens, shape.kv_heads, size),
        kv_pages=jax.device_put(pool, pool_formats(pool)),
        batch=batch,
    )


def pool_formats(pool: KvPool) -> Any:
    """The formats of a pool's arrays, into and out of programs."""
    return jax.tree.map(lambda array: pool_format(array.sharding, array.ndim), pool)


def _query_dtype(shape: Shape) -> np.dtype:
    return jnp.dtype(shape.dtype if shape.query_dtype is None else shape.query_dtype)
